"""Seconds until commands answer: the median of whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.record import write_result

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "harness --help": [sys.executable, "-m", "harness", "--help"],
    "harness plan": [sys.executable, "-m", "harness", "plan", "examples/quickstart.yaml"],
    "harness schema": [sys.executable, "-m", "harness", "schema"],
}
NUM_RUNS = 7


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    values = {}
    for name, command in COMMANDS.items():
        seconds(command)
        runs = [seconds(command) for _ in range(NUM_RUNS)]
        values[name] = {"median_s": round(statistics.median(runs), 3), "max_s": round(max(runs), 3)}
    write_result("startup", "python -m benchmarks.startup", values)


if __name__ == "__main__":
    main()
