"""A result file: figures with the command that makes them again, versions and machine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from harness.launch.run_directory import describe_environment

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, command: str, values: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json and print the figures."""
    environment = describe_environment()
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": environment["accelerator"],
    }
    content = {
        "command": command,
        "values": values,
        "machine": machine,
        "python": platform.python_version(),
        "packages": {name: version for name, version in environment["packages"].items() if version},
        "commit": environment["commit"],
        "time": environment["time"],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(values, indent=2))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
