"""A rank that trains a tiny language model with AdaLoRA under several ZeRO stages, once broken off and resumed.

python tests/adalora_worker.py STORE RANK WORLD_SIZE RUN.yaml ...

The rows are drawn by `rows_of_step`; what comes out is RUN_DIR/result-RANK.json and, from rank 0, weights.safetensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.checkpoint import state as checkpoint_state
from harness.checkpoint.store import CheckpointStore
from harness.config.load import load_run_config
from harness.config.schema import RunConfig
from harness.engine.build import apply_gradients, build_engine
from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.engine.rank_allocation import RankAllocator
from harness.models.assemble import assemble
from harness.plan.deepspeed import final_deepspeed_config

NUM_STEPS, NUM_MICRO_STEPS, BROKEN_OFF_AT = 20, 2, 8
WORLD_SIZE, NUM_ROWS, LENGTH = 2, 2, 9
NUM_TARGETS = WORLD_SIZE * NUM_MICRO_STEPS * NUM_ROWS * (LENGTH - 1)


def rows_of_step(step: int) -> Tensor:
    """Token ids [micro-step, rank, row, position]."""
    shape = (NUM_MICRO_STEPS, WORLD_SIZE, NUM_ROWS, LENGTH)
    return torch.randint(5, 300, shape, generator=torch.Generator().manual_seed(step))


def loss_sum(model: Any, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")


def run(config: RunConfig, processes: Processes, directory: Path) -> None:
    store = CheckpointStore(directory / "checkpoints")
    result: dict[str, Any] = {"num_zeros": []}
    is_broken_off = config.name.startswith("resumed")
    engine, allocator = opened(config, processes)
    for step in range(1, NUM_STEPS + 1):
        rows = rows_of_step(step)
        for micro_step in range(NUM_MICRO_STEPS):
            loss = loss_sum(engine, rows[micro_step, processes.rank]) * (WORLD_SIZE / NUM_TARGETS)
            engine.backward(loss, scale_wrt_gas=False)
        outcome = apply_gradients(engine, config.optimizer.lr)
        allocator.after_step(step, applied=outcome.applied)
        if is_broken_off and step == BROKEN_OFF_AT:
            checkpoint_state.save(store, engine, processes, step=step, state={})
            engine.destroy()
            engine, allocator = opened(config, processes)
            checkpoint_state.load(checkpoint_state.open_together(store, processes, step), engine)
        result["num_zeros"].append(sum(int((w == 0).sum()) for name, w in whole_weights(engine) if ".lora_E." in name))
    weights = dict(whole_weights(engine))
    if processes.is_first:
        save_file(weights, directory / "weights.safetensors")
    (directory / f"result-{processes.rank}.json").write_text(json.dumps(result))
    engine.destroy()


def opened(config: RunConfig, processes: Processes) -> tuple[Any, RankAllocator]:
    model, _, _ = assemble(config, step=0, total_steps=NUM_STEPS)
    engine = build_engine(model, config.optimizer, final_deepspeed_config(config, WORLD_SIZE), processes)
    return engine, RankAllocator(engine)


def whole_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The trained weights of the forward pass, on every rank."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, parameter.detach().clone()


def main(store_path: str, rank: int, world_size: int, run_files: list[str]) -> None:
    store = find_store(rank=rank, world_size=world_size, store_path=Path(store_path))
    processes = Processes(rank, rank, world_size, find_device(rank), store)
    join(processes, timeout_s=120.0)
    for run_file in run_files:
        config = load_run_config(Path(run_file))
        directory = Path(config.output_dir) / config.name
        directory.mkdir(exist_ok=True)
        run(config, processes, directory)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
