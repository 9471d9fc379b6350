"""What becomes of a run of two ranks when it is disturbed: `harness train` beside plain torchrun and deepspeed.

python -m benchmarks.launcher_faults

All three train the same tiny model by gloo with `launch.collective_timeout_s` 20; `harness train` with a heartbeat
time-out of 5 s and no restarts. Each cell: seconds until the launcher ended, its exit code, ranks left 3 s later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from tests.e2e.test_launchers import ranks_of
from tests.runs import tiny_run, write_run
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
SCRIPT = str(ROOT / "launch" / "train.py")
LAUNCHERS = {
    "harness train": ["harness", "train"],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", SCRIPT],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "29617", SCRIPT],
}
FAULTS: dict[str, Callable[[int, dict[int, int]], None]] = {
    "rank 1 SIGKILL": lambda launcher, ranks: os.kill(ranks[1], signal.SIGKILL),
    "rank 1 SIGSTOP": lambda launcher, ranks: os.kill(ranks[1], signal.SIGSTOP),
    "launcher SIGTERM": lambda launcher, ranks: os.kill(launcher, signal.SIGTERM),
    "launcher SIGKILL": lambda launcher, ranks: os.kill(launcher, signal.SIGKILL),
}
PATIENCE_S = 90.0
SETTLE_S = 3.0


def measure(launcher: str, fault: str, model: Path, directory: Path) -> dict[str, Any]:
    launch = {"processes": 2, "collective_timeout_s": 20.0, "heartbeat_timeout_s": 5.0, "max_restarts": 0}
    run = tiny_run(directory, model, name="run", schedule={"name": "constant", "steps": 100_000}, launch=launch)
    program, *arguments = LAUNCHERS[launcher]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(
            [str(PROGRAMS / program), *arguments, str(write_run(run))],
            cwd=directory, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    metrics = directory / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"event": "step"') < 5:
        assert process.poll() is None, (directory / "output").read_text()
        time.sleep(0.05)
    ranks = ranks_of(directory)
    FAULTS[fault](process.pid, ranks)
    began = time.monotonic()
    try:
        code: int | None = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - began
    time.sleep(SETTLE_S)
    left = [rank for rank, process_id in ranks_of(directory).items() if process_id in ranks.values()]
    for process_id in [process.pid, *ranks_of(directory).values()]:
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return {"seconds": round(seconds, 1), "exit_code": code, "ranks_left": len(left)}


def main() -> None:
    values: dict[str, dict[str, Any]] = {fault: {} for fault in FAULTS}
    with tempfile.TemporaryDirectory() as temporary:
        model = make_tiny_model("mbart", Path(temporary) / "model")
        for fault in FAULTS:
            for launcher in LAUNCHERS:
                directory = Path(temporary) / f"{fault}-{launcher}".replace(" ", "-")
                directory.mkdir()
                values[fault][launcher] = measure(launcher, fault, model, directory)
    write_result("launcher-faults", "python -m benchmarks.launcher_faults", values)


if __name__ == "__main__":
    main()
