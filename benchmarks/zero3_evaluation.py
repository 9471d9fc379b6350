"""An evaluation on two ranks under ZeRO-3, with weights gathered once and in step, against ZeRO-0, on one machine.

`python -m benchmarks.zero3_evaluation [rows]`. examples/base in float32 on held-out rows of examples/data, beam 5: loss
and decoding and scores, the fastest of three rounds. Every parameter is sharded, as in a large model (DeepSpeed
leaves small ones whole).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from benchmarks.record import write_result
from examples.demo import BASE, ROOT, RUN_FILE, TEST
from harness.cluster.backends import plan_run
from harness.config.schema import RunConfig
from harness.data.cache import load_rows, prepare_rows
from harness.data.encoded import EncodedRows
from harness.data.sources import as_source
from harness.engine import gathered
from harness.engine.build import build_engine
from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.evaluation.evaluate import evaluate
from harness.plan.plan import Plan
from harness.training.prepare import build_task, encoding

NUM_RANKS, NUM_ROUNDS, NUM_WARM_UP = 2, 3, 4
MODES = {"zero0": "zero0", "zero3_gathered": "zero3", "zero3_in_step": "zero3"}
OVERRIDES = ["model.dtype=float32", "evaluation.bootstrap_samples=0"]
SHARD_ALL = "deepspeed.overrides={zero_optimization: {stage3_param_persistence_threshold: 0}}"


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as directory:
        plan = plan_of("zero0", Path(directory))
        rows = prepare_rows(
            "test", [as_source(TEST)], plan.config.data,
            **encoding(plan.config, build_task(plan.config), is_training=False), cache_root=Path(directory) / "rows",
        ).rows.directory  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.zero3_evaluation", "rank", directory, str(rows), str(num_rows)]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(NUM_RANKS)]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * NUM_RANKS, codes
        found = json.loads((Path(directory) / "found.json").read_text(encoding="utf-8"))
    seconds = {mode: round(found[mode]["seconds"], 2) for mode in MODES}
    values: dict[str, Any] = {"sentences": num_rows, "ranks": NUM_RANKS, "seconds": seconds}
    for mode in ("zero3_gathered", "zero3_in_step"):
        values[f"{mode}_times_zero0"] = round(found[mode]["seconds"] / found["zero0"]["seconds"], 2)
    values["same_hypotheses"] = all(one["hypotheses"] == found["zero0"]["hypotheses"] for one in found.values())
    write_result("zero3-evaluation", f"python -m benchmarks.zero3_evaluation {num_rows}", values)


def plan_of(preset: str, directory: Path) -> Plan:
    sharded = [SHARD_ALL] if preset == "zero3" else []
    overrides = [*OVERRIDES, *sharded, f"deepspeed.preset={preset}", f"output_dir={directory}"]
    return plan_run(ROOT / RUN_FILE, overrides, world_size=NUM_RANKS)


def run_rank(directory: Path, rows: EncodedRows, num_rows: int, rank: int) -> None:
    store = find_store(rank=rank, world_size=NUM_RANKS, store_path=directory / "store")
    processes = Processes(rank, rank, NUM_RANKS, find_device(rank), store)
    torch.set_num_threads(1)
    join(processes, timeout_s=600.0)
    task = build_task(plan_of("zero0", directory).config)
    engines = {mode: open_engine(preset, directory, processes) for mode, preset in MODES.items()}
    found: dict[str, dict[str, Any]] = {mode: {"seconds": float("inf")} for mode in MODES}
    for number in (NUM_WARM_UP, *[num_rows] * NUM_ROUNDS):
        for mode, (engine, config) in engines.items():
            gathered.SHARE_OF_FREE_MEMORY = 0.5 if mode == "zero3_gathered" else 0.0
            processes.barrier()
            started = time.monotonic()
            with gathered.whole_weights(engine, processes) as has_all:
                assert has_all == (mode != "zero3_in_step")
                result: Any = evaluate(
                    engine.module, rows, task, processes, config=config, num_rows=number, synced=not has_all
                )
            processes.barrier()
            if number == num_rows:
                seconds = min(found[mode]["seconds"], time.monotonic() - started)
                found[mode] = {"seconds": seconds, "hypotheses": result.hypotheses}
    if processes.is_first:
        (directory / "found.json").write_text(json.dumps(found), encoding="utf-8")
    leave()


def open_engine(preset: str, directory: Path, processes: Processes) -> tuple[Any, RunConfig]:
    plan = plan_of(preset, directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(ROOT / BASE, dtype=torch.float32)
    return build_engine(model, plan.config.optimizer, plan.deepspeed, processes), plan.config


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(Path(sys.argv[2]), load_rows(Path(sys.argv[3])), int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
