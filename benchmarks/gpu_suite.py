"""What a CPU cannot show: bf16, attention kernels, NCCL and decoding on one GPU, as short real runs.

    python -m benchmarks.gpu_suite

A 12 + 12 layer mBART of random weights (d_model 1024) is trained for a few steps on the demo's pairs in each setting.
Losses of equal precision must agree; speeds are compared as ratios to the first setting.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

ROOT = Path(__file__).parent.parent
LARGE = {
    "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16, "decoder_attention_heads": 16,
}  # fmt: skip
SETTINGS: dict[str, list[str]] = {
    "bf16 sdpa zero0": [],
    "bf16 eager zero0": ["model.attention=eager"],
    "bf16 sdpa zero1": ["deepspeed.preset=zero1"],
    "bf16 sdpa zero2": ["deepspeed.preset=zero2"],
    "bf16 sdpa zero3": ["deepspeed.preset=zero3"],
    "bf16 sdpa zero2 offload": ["deepspeed.preset=zero2_offload"],
    "bf16 sdpa checkpointing": ["model.gradient_checkpointing=true"],
    "fp16 sdpa zero2": ["deepspeed.preset=zero2", "model.dtype=float16"],
    "fp32 sdpa zero0": ["model.dtype=float32"],
}
if find_spec("flash_attn"):
    SETTINGS["bf16 flash zero0"] = ["model.attention=flash_attention_2"]


def make_model(directory: Path) -> Path:
    """The demo's tokeniser with a config.json of mbart-large's size."""
    shutil.copytree(ROOT / "examples" / "base", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | LARGE), encoding="utf-8")
    return directory


def run(name: str, overrides: list[str], model: Path, output_dir: Path) -> dict[str, Any]:
    """One short run; its failure is a result too."""
    arguments = [
        "examples/quickstart.yaml", f"name={name.replace(' ', '-')}", f"output_dir={output_dir}", "model.path=null",
        f"model.config={model}", "model.dropout=0.0", "launch.processes=1", "schedule={name: constant, steps: 30}",
        "optimizer.lr=1e-4", "batch={tokens_per_step: 32768, max_tokens_per_device: 16384}", "deepspeed.preset=zero0",
        "data.test=null", "evaluation={beam_size: 5, max_rows: 200, initial: false, metrics: [bleu]}", *overrides,
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "harness", "train", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        return {"exit_code": ended.returncode, "error": ended.stderr.strip()[-500:]}
    lines = (output_dir / name.replace(" ", "-") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["event"] == "step"]
    timed = steps[10:]
    seconds = sum(step["target_tokens"] / step["tokens_per_second"] for step in timed)
    evaluation = next(record for record in records if record["event"] == "evaluation")
    return {
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "tokens_per_second": round(sum(step["target_tokens"] for step in timed) / seconds),
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
        "decode_s": round(evaluation["decode_seconds"], 2),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(Path(temporary) / "model")
        values = {}
        for name, overrides in SETTINGS.items():
            values[name] = run(name, overrides, model, Path(temporary))
            print(name, values[name], flush=True)
    reference = values["bf16 sdpa zero0"].get("tokens_per_second")
    for result in values.values():
        if reference and "tokens_per_second" in result:
            result["speed_ratio"] = round(result["tokens_per_second"] / reference, 3)
    write_result("gpu_suite", "python -m benchmarks.gpu_suite", values)


if __name__ == "__main__":
    main()
