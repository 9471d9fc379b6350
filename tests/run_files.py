"""A right run file, and right run files with one thing changed."""

from __future__ import annotations

from pathlib import Path

RIGHT = """\
name: enro
output_dir: runs
model:
  path: no-such-org/no-such-model
  dtype: bfloat16
data:
  train: [{path: train.tsv}]
  validation: dev.tsv
  source_language: en_XX
  target_language: ro_RO
  max_source_length: 128
  max_target_length: 128
batch: {tokens_per_step: 4096, max_tokens_per_device: 1024}
optimizer: {lr: 3e-5}
schedule: {warmup_steps: 10, steps: 100}
deepspeed: {preset: zero2}
evaluation: {every_steps: 50}
"""


def write_run_file(directory: Path, *replacements: tuple[str, str], text: str = RIGHT) -> Path:
    """``text`` with each (old, new) replaced, as ``run.yaml`` in ``directory``."""
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path
