"""What a CPU cannot show: bf16, attention kernels, bitsandbytes, NCCL and decoding on one GPU, as short real runs.

    python -m benchmarks.gpu_suite

A 12 + 12 layer mBART (d_model 1024) and a 16 layer Llama (width 2048), both of random weights, are trained for a few
steps on the demo's pairs in each setting. Losses of equal precision must agree; speeds are compared as ratios to the
first setting of each model.
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

import torch

from benchmarks.record import write_result
from harness.config.schema import ModelConfig, Task
from harness.models.load import load_model

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
    "fp32 decoding in bf16": ["model.dtype=float32", "evaluation.precision=bfloat16"],
    "bf16 checkpointing offload": ["model.gradient_checkpointing={offload: true}"],
    "bf16 fused adam zero2": ["deepspeed.preset=zero2", "optimizer.implementation=deepspeed"],
    "bf16 adamw_8bit zero2": ["deepspeed.preset=zero2", "optimizer.name=adamw_8bit"],
    "bf16 paged adamw_8bit zero2": ["deepspeed.preset=zero2", "optimizer.name=paged_adamw_8bit"],
    "bf16 lion zero2": ["deepspeed.preset=zero2", "optimizer.name=lion"],
    "bf16 lora zero2": ["deepspeed.preset=zero2", "adapter={rank: 16}"],
    "nf4 lora zero2": ["deepspeed.preset=zero2", "adapter={rank: 16}", "model.quantization={}"],
}
CAUSAL_SETTINGS: dict[str, list[str]] = {
    "llm bf16 packed": [],
    "llm bf16 not packed": ["data.packing=false"],
    "llm bf16 lora": ["adapter={rank: 16}"],
    "llm nf4 lora": ["adapter={rank: 16}", "model.quantization={}"],
    "llm nf4 lora zero3": ["adapter={rank: 16}", "model.quantization={}", "deepspeed.preset=zero3"],
    "llm int8 lora": ["adapter={rank: 16}", "model.quantization={bits: 8}"],
    "llm nf4 lora checkpointing": [
        "adapter={rank: 16}", "model.quantization={}", "model.gradient_checkpointing=true"
    ],
}  # fmt: skip
if find_spec("flash_attn"):
    SETTINGS["bf16 flash zero0"] = ["model.attention=flash_attention_2"]
    CAUSAL_SETTINGS["llm bf16 flash packed"] = ["model.attention=flash_attention_2"]
COMMON = [
    "launch.processes=1", "schedule={name: constant, steps: 30}", "optimizer.lr=1e-4", "deepspeed.preset=zero0",
    "data.test=null", "batch={tokens_per_step: 32768, max_tokens_per_device: 16384}",
]  # fmt: skip
TRANSLATION = ["model.dropout=0.0", "evaluation={beam_size: 5, max_rows: 200, initial: false, metrics: [bleu]}"]
CAUSAL = [
    "task=causal_lm", "data.format=prompt", "data.prompt_column=source", "data.completion_column=target",
    "data.source_language=null", "data.target_language=null", "data.max_source_length=256",
    "data.max_target_length=256", "model.dropout=null", "loss={}",
    "evaluation={beam_size: 1, max_rows: 200, initial: false, metrics: [bleu]}",
]  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(directory: Path, task: Task, llama: dict[str, Any] = LLAMA) -> Path:
    """The demo's tokeniser with random weights of mbart-large's size, or of a small Llama's."""
    shutil.copytree(ROOT / "examples" / "base", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ids = {key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    content = config | LARGE if task == "translation" else llama | ids
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    load_model(ModelConfig(config=str(directory)), 0, task=task).to(torch.bfloat16).save_pretrained(directory)
    return directory


def run(name: str, overrides: list[str], model: Path, output_dir: Path) -> dict[str, Any]:
    """One short run; its failure is a result too."""
    place = [f"name={name.replace(' ', '-')}", f"output_dir={output_dir}", f"model.path={model}"]
    arguments = ["examples/quickstart.yaml", *place, *COMMON, *overrides]
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


def suite(directory: Path, task: Task, settings: dict[str, list[str]], common: list[str]) -> dict[str, dict[str, Any]]:
    """Every setting of one task; `speed_ratio` is to the first."""
    model = make_model(directory / task, task)
    values = {}
    for name, overrides in settings.items():
        values[name] = run(name, [*common, *overrides], model, directory)
        print(name, values[name], flush=True)
    reference = values[next(iter(settings))].get("tokens_per_second")
    for result in values.values():
        if reference and "tokens_per_second" in result:
            result["speed_ratio"] = round(result["tokens_per_second"] / reference, 3)
    return values


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        values = suite(Path(temporary), "translation", SETTINGS, TRANSLATION)
        values |= suite(Path(temporary), "causal_lm", CAUSAL_SETTINGS, CAUSAL)
    write_result("gpu_suite", "python -m benchmarks.gpu_suite", values)


if __name__ == "__main__":
    main()
