"""Ranks that make short runs of a small model with engine and checkpoints alone: no data, no loop, no records.

    python tests/engine_worker.py DIRECTORY RANK WORLD_SIZE

DIRECTORY/cases.json is a list of `Case`s; each leaves NAME.json (what rank 0 saw) and NAME/step-* (checkpoints).
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import MBartConfig, MBartForConditionalGeneration

from harness.checkpoint import state as checkpoint_state
from harness.checkpoint.store import CheckpointStore
from harness.config.schema import FreezeRule, OptimizerConfig
from harness.engine import measure
from harness.engine.build import apply_gradients, build_engine, close_engine
from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.errors import DataError
from harness.models.freeze import Freezing, phase_boundaries, resolve_freezing

VOCABULARY, NUM_ROWS, LENGTH, PEAK = 120, 4, 7, 1e-3


@dataclass
class Case:
    """One run. It is saved, closed, built anew and loaded after each step in `reopen_at`, and at phase boundaries."""

    name: str
    stage: int = 0
    offload: bool = False
    dtype: str = "float32"
    optimizer: dict[str, Any] = field(default_factory=dict)
    freeze: list[dict[str, Any]] = field(default_factory=list)
    reopen_at: list[int] = field(default_factory=list)
    first: str | None = None  # begin from the newest checkpoint of this case
    steps: int = 10
    clip_norm: float = 0.5

    @property
    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(**{"lr": PEAK, "weight_decay": 0.1, **self.optimizer})

    @property
    def rules(self) -> list[FreezeRule]:
        return [FreezeRule(**rule) for rule in self.freeze]

    def deepspeed(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        document = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": self.clip_norm,
            "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "managed_gradient_accumulation": False, "log_level": "error",
        }  # fmt: skip
        return document | ({"bf16": {"enabled": True}} if self.dtype == "bfloat16" else {})


def make_model() -> MBartForConditionalGeneration:
    """Two layers a side; its large matrices have more than 4096 values, from which on bitsandbytes quantises."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    rates = {"dropout": 0.0, "attention_dropout": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = MBartConfig(**sizes, **layers, **rates, max_position_embeddings=32, init_std=0.1)
        return MBartForConditionalGeneration(config).train()


def rows_of(step: int) -> Tensor:
    """The tokens of a global batch, (4, 7)."""
    return torch.randint(3, VOCABULARY, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_sum(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows, decoder_input_ids=rows.roll(1, 1), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows.flatten(), reduction="sum")


def digest(parameters: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, parameter in parameters.items():
        found.update(name.encode() + parameter.detach().numpy().tobytes())
    return found.hexdigest()


def whole(parameters: Iterable[Any]) -> Any:
    """ZeRO-3 gathers the parameters for the time of this context."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def num_gradients(engine: Any) -> int | None:
    """Values of gradients on all ranks after the backward passes of a step; stages 1 and 2 keep them out of sight."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return int(engine.optimizer.grad_partitions_flat_buffer.numel()) * dist.get_world_size()
    return None if stage else sum(p.grad.numel() for p in engine.module.parameters() if p.grad is not None)


def rate_at(step: int) -> float:
    """Multiple of the peak learning rate."""
    return 1.0 - 0.05 * step


class Run:
    """What loop and session do, in small."""

    def __init__(self, case: Case, directory: Path, processes: Processes) -> None:
        self.case, self.processes = case, processes
        self.store = CheckpointStore(directory / case.name)
        self.step = 0
        self.seen: dict[str, list[Any]] = {
            name: [] for name in ("losses", "norms", "bytes", "gradients", "frozen", "leaked")
        }
        self.engine: Any = None
        self.freezing: Freezing
        if case.first is not None:
            self.load(CheckpointStore(directory / case.first))
        else:
            self.open()

    def open(self) -> None:
        model = make_model()
        self.freezing = resolve_freezing(model, self.case.rules)
        self.freezing.apply(model, self.step + 1)
        self.engine = build_engine(
            model, self.case.optimizer_config, self.case.deepspeed(), self.processes, starts=self.freezing.starts
        )

    def load(self, store: CheckpointStore) -> None:
        checkpoint, _ = checkpoint_state.newest(store, self.processes)
        assert checkpoint is not None
        self.step = checkpoint.step
        self.open()
        thawed = set(self.freezing.trainable_at(self.step + 1)) - set(self.freezing.trainable_at(self.step))
        checkpoint_state.load(checkpoint, self.engine, thawed=thawed)

    def reopen(self) -> None:
        self.save()
        parts = {"optimizer": weakref.ref(self.engine.optimizer), "module": weakref.ref(self.engine.module)}
        close_engine(self.engine)
        self.seen["leaked"] += [name for name, part in parts.items() if part() is not None]
        self.load(self.store)

    def save(self) -> None:
        checkpoint_state.save(self.store, self.engine, self.processes, step=self.step, state={})

    def train(self) -> None:
        pauses = {*self.case.reopen_at, *phase_boundaries(self.case.rules)}
        while self.step < self.case.steps:
            self.make_step()
            if self.step in pauses and self.step < self.case.steps:
                self.reopen()
        self.save()

    def make_step(self) -> None:
        rows = rows_of(self.step + 1)
        mine = rows[self.processes.rank :: self.processes.world_size]
        loss = loss_sum(self.engine, mine)
        self.engine.backward(loss * (self.processes.world_size / rows.numel()), scale_wrt_gas=False)
        self.seen["gradients"].append(num_gradients(self.engine))
        outcome = apply_gradients(self.engine, self.case.optimizer_config.lr * rate_at(self.step))
        assert outcome.applied
        self.step += 1
        self.seen["losses"].append(self.processes.sum([float(loss.detach())])[0] / rows.numel())
        self.seen["norms"].append(outcome.grad_norm)
        self.seen["bytes"].append(measure.optimizer_bytes(self.engine))
        if self.case.freeze:
            frozen = {name: p for name, p in self.engine.module.named_parameters() if not p.requires_grad}
            with whole(frozen.values()):
                self.seen["frozen"].append(digest(frozen))


def make_run(case: Case, directory: Path, processes: Processes) -> dict[str, Any]:
    run = Run(case, directory, processes)
    run.train()
    close_engine(run.engine)
    return run.seen


def main(directory: Path, rank: int, world_size: int) -> None:
    store = find_store(rank=rank, world_size=world_size, store_path=directory / "store")
    processes = Processes(rank, rank, world_size, find_device(rank), store)
    join(processes, timeout_s=120.0)
    for content in json.loads((directory / "cases.json").read_text()):
        case = Case(**content)
        try:
            seen = make_run(case, directory, processes)
        except DataError as error:
            seen = {"error": str(error)}
        if processes.is_first:
            (directory / f"{case.name}.json").write_text(json.dumps(seen))
        dist.barrier()
    leave()


def write_cases(directory: Path, cases: list[Case]) -> None:
    (directory / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
