"""Planning an epoch of 10 million rows into global batches, and cutting one step for 1,024 ranks."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.record import write_result
from harness.data.batches import cut_step, plan_epoch

NUM_ROWS = 10_000_000


def main() -> None:
    sizes = np.clip(np.random.default_rng(0).lognormal(3.2, 0.6, NUM_ROWS).astype(np.int32), 3, 250)
    started = time.perf_counter()
    plan = plan_epoch(sizes, seed=1, epoch=0, tokens_per_step=262_144)
    plan_s = time.perf_counter() - started
    started = time.perf_counter()
    cut = cut_step(plan.rows_of(7), sizes, max_tokens_per_device=2048, world_size=1024)
    cut_s = time.perf_counter() - started
    values = {
        "rows": NUM_ROWS, "steps": plan.num_steps, "plan_s": round(plan_s, 2),
        "micro_steps": len(cut), "cut_step_for_1024_ranks_s": round(cut_s, 4),
    }  # fmt: skip
    write_result("planning", "python -m benchmarks.planning", values)


if __name__ == "__main__":
    main()
