"""A rank that makes several short runs in one process group, so that tests pay for start-up once.

python tests/worker.py STORE RANK WORLD_SIZE RUN.yaml ...
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.errors import HarnessError
from harness.launch.run_directory import opened_run_directory, plan_run
from harness.training.finish import finish
from harness.training.loop import train
from harness.training.prepare import prepare
from harness.training.session import open_session
from harness.training.stop import StopRequest


def main(store_path: str, rank: int, world_size: int, run_files: list[str]) -> None:
    store = find_store(rank=rank, world_size=world_size, store_path=Path(store_path))
    meeting = Processes(rank, rank, world_size, find_device(rank), store)
    join(meeting, timeout_s=120.0)
    for run_file in run_files:
        plan = plan_run(Path(run_file), [], world_size=world_size)
        run_dir = Path(plan.run_dir)
        processes = replace(meeting, store=dist.PrefixStore(plan.config.name, store))

        def prepare_run() -> dict[str, Any]:
            with opened_run_directory(plan):  # noqa: B023 - called within this turn of the loop
                return prepare(plan.config, run_dir)  # noqa: B023

        prepared = processes.first_rank_prepares(prepare_run)
        try:
            session = open_session(plan, run_dir, prepared, processes, StopRequest(run_dir), {})
            with closing(session.records):
                train(session)
                finish(session)
        except HarnessError as error:
            (run_dir / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
