"""Memory of LoRA on a base in 16, 8 and 4 bits: one CPU rank, a few steps, a Llama of 16 layers and width 2,048.

    python -m benchmarks.quantization

The weights are random. What the rank's process holds is read from /proc while it runs: memory of its own, and pages of
files, which count as long as they are mapped (the kernel may drop them; those of a 16-bit base are its weights).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.gpu_suite import CAUSAL, ROOT, make_model
from benchmarks.record import write_result

COMMON = [
    "launch.processes=1", "schedule={name: constant, steps: 1000}", "optimizer.lr=1e-4", "deepspeed.preset=zero2",
    "data.test=null", "batch={tokens_per_step: 256, max_tokens_per_device: 256}", "adapter={rank: 16}",
    "data.validation=null", "evaluation=null", "data.max_length=256", "data.packing=false",
]  # fmt: skip
SETTINGS = {
    "bfloat16": [],
    "8 bits": ["model.quantization={bits: 8}"],
    "nf4, double": ["model.quantization={}"],
    "nf4, double, recomputation": ["model.quantization={}", "model.gradient_checkpointing=true"],
}
INTERVAL_S = 0.1
NUM_STEPS = 2


class Held(NamedTuple):
    """What a process holds at a time, in bytes: memory of its own, and pages of mapped files."""

    time_s: float
    own: int
    files: int

    @property
    def mib(self) -> dict[str, int]:
        return {"total": self.own + self.files >> 20, "own": self.own >> 20, "files": self.files >> 20}


def watch(process: subprocess.Popen[bytes], run_dir: Path) -> list[Held]:
    """What the rank, the child of `process` that holds most, holds until it has made its steps; then it is stopped."""
    found: dict[int, list[Held]] = {}
    stopping = False
    while process.poll() is None:
        if not stopping and len(events(run_dir, "step")) >= NUM_STEPS:
            process.terminate()
            stopping = True
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(OSError, KeyError):  # it has just ended
                sample = held(child.pid)
                found.setdefault(child.pid, []).append(sample)
        time.sleep(INTERVAL_S)
    return max(found.values(), key=lambda samples: peak(samples).own)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The records of one kind, as far as they are written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [record for line in lines if (record := json.loads(line))["event"] == name]


def held(pid: int) -> Held:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "Rss" in name}
    return Held(time.time(), kib["RssAnon"] << 10, kib["RssFile"] + kib["RssShmem"] << 10)


def peak(samples: Sequence[Held]) -> Held:
    return max(samples, key=lambda sample: sample.own + sample.files)


def run(name: str, overrides: list[str], model: Path, output_dir: Path) -> dict[str, Any]:
    common = [one for one in CAUSAL if not one.startswith("evaluation")]
    run_dir = output_dir / name.replace(", ", "-").replace(" ", "-")
    place = [f"name={run_dir.name}", f"output_dir={output_dir}"]
    arguments = ["examples/quickstart.yaml", f"model.path={model}", *place, *COMMON, *common, *overrides]
    samples = watch(subprocess.Popen([sys.executable, "-m", "harness", "train", *arguments], cwd=ROOT), run_dir)
    (start,) = events(run_dir, "start")
    last = events(run_dir, "step")[-1]
    loading = start["time_s"] - start["engine_s"] - start["model_s"]
    return {
        "before_loading_mib": [one for one in samples if one.time_s < loading][-1].mib,
        "peak_of_loading_mib": peak([one for one in samples if loading <= one.time_s < start["time_s"]]).mib,
        "loaded_mib": [one for one in samples if one.time_s < start["time_s"]][-1].mib,
        "peak_of_steps_mib": peak([one for one in samples if start["time_s"] <= one.time_s <= last["time_s"]]).mib,
        "peak_mib": last["peak_memory_bytes"] >> 20,
        "loss": last["loss"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(Path(temporary) / "model", "causal_lm")
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        values: dict[str, Any] = {"weights_on_disk_mib": size >> 20}
        for name, overrides in SETTINGS.items():
            values[name] = run(name, overrides, model, Path(temporary))
            print(name, values[name], flush=True)
    write_result("quantization", "python -m benchmarks.quantization", values)


if __name__ == "__main__":
    main()
