"""Peak memory of LoRA on a base in 16, 8 and 4 bits: one rank, a few steps, a Llama of 238 million random weights.

python -m benchmarks.quantization
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite import CAUSAL, LLAMA, ROOT, make_model
from benchmarks.record import write_result

SMALL = LLAMA | {"hidden_size": 1024, "intermediate_size": 2816}
COMMON = [
    "launch.processes=1", "schedule={name: constant, steps: 3}", "optimizer.lr=1e-4", "deepspeed.preset=zero2",
    "data.test=null", "batch={tokens_per_step: 256, max_tokens_per_device: 256}", "adapter={rank: 16}",
    "data.validation=null", "evaluation=null", "data.max_length=256",
]  # fmt: skip
SETTINGS = {
    "bfloat16": [],
    "8 bits": ["model.quantization={bits: 8}"],
    "nf4": ["model.quantization={double: false}"],
    "nf4, double": ["model.quantization={}"],
    "nf4, double, recomputation": ["model.quantization={}", "model.gradient_checkpointing=true"],
}


def run(name: str, overrides: list[str], model: Path, output_dir: Path) -> dict[str, Any]:
    common = [one for one in CAUSAL if not one.startswith("evaluation")]
    place = [f"name={len(name)}-{name.split(',')[0].replace(' ', '-')}", f"output_dir={output_dir}"]
    arguments = ["examples/quickstart.yaml", f"model.path={model}", *place, *COMMON, *common, *overrides]
    subprocess.run([sys.executable, "-m", "harness", "train", *arguments], cwd=ROOT, check=True)
    (run_dir,) = output_dir.glob(place[0].removeprefix("name="))
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [step for step in steps if step["event"] == "step"][-1]
    return {"peak_memory_mib": last["peak_memory_bytes"] >> 20, "loss": last["loss"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(Path(temporary) / "model", "causal_lm", SMALL)
        values = {name: run(name, overrides, model, Path(temporary)) for name, overrides in SETTINGS.items()}
    write_result("quantization", "python -m benchmarks.quantization", values)


if __name__ == "__main__":
    main()
