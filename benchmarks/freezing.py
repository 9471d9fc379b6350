"""Peak memory of training steps with frozen parts and with smaller optimizer states, ZeRO-2, one process, float32.

Each run has a process of its own. In the last one the engine is closed and built anew where the encoder is thawed.
"""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from benchmarks.record import write_result
from harness.config.schema import FreezeRule, OptimizerConfig
from harness.engine.build import apply_gradients, build_engine, close_engine
from harness.engine.measure import optimizer_bytes
from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.models.freeze import resolve_freezing

SHAPE: dict[str, Any] = {"vocab_size": 16_000, "d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
LAYERS: dict[str, Any] = {"encoder_layers": 6, "decoder_layers": 6}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True, "managed_gradient_accumulation": False, "log_level": "error",
}  # fmt: skip
EMBEDDINGS = FreezeRule(embeddings=True)
RUNS: dict[str, tuple[str, list[FreezeRule], int]] = {  # optimizer, rules, phases
    "all trained": ("adamw", [], 1),
    "all trained, lion": ("lion", [], 1),
    "all trained, adamw_8bit": ("adamw_8bit", [], 1),
    "embeddings frozen": ("adamw", [EMBEDDINGS], 1),
    "embeddings and, in phase 1, encoder frozen": ("adamw", [EMBEDDINGS, FreezeRule(encoder="all", until_step=1)], 2),
}


def main() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        values = {name: next(iter(pool.map(run, [name]))) for name in RUNS}
    write_result("freezing", "python -m benchmarks.freezing", values)


def run(name: str) -> list[dict[str, Any]]:
    """The figures of each phase."""
    optimizer, rules, num_phases = RUNS[name]
    processes = Processes(0, 0, 1, find_device(0), find_store(rank=0, world_size=1, store_path=None))
    join(processes, timeout_s=60.0)
    before = resident_bytes("VmRSS")
    phases = [measured(processes, optimizer, rules, step, before) for step in range(1, num_phases + 1)]
    leave()
    return phases


def measured(processes: Processes, optimizer: str, rules: list[FreezeRule], step: int, before: int) -> dict[str, Any]:
    """Two steps of one batch of eight rows of 32 tokens; memory is that of this process above `before`."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(MBartConfig(**SHAPE, **LAYERS))
    freezing = resolve_freezing(model, rules)
    freezing.apply(model, step)
    engine = build_engine(model, OptimizerConfig(name=optimizer, lr=1e-4), DEEPSPEED, processes, starts=freezing.starts)
    rows = torch.randint(SHAPE["vocab_size"], (8, 32))
    for _ in range(2):
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        apply_gradients(engine, 1e-4)
    values = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "masters_and_moments_mib": optimizer_bytes(engine) >> 20,
        "peak_mib": (resident_bytes("VmHWM") - before) >> 20,
    }
    del loss, model
    close_engine(engine)
    return values


def resident_bytes(kind: str) -> int:
    """VmRSS: now; VmHWM: the largest so far."""
    match = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
