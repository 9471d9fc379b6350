"""Instructions out of the LibreOffice help pairs: "Translate to English: ..." with the answer.

    python -m examples.llm.make_instructions DIRECTORY

Writes `train.tsv` and `test.tsv` (columns page, prompt, completion). Only short sentences are taken, by a seeded
shuffle, so that a small model learns something in minutes. The pages of test are not among those of train.
"""

from __future__ import annotations

import csv
import gzip
import random
import sys
from pathlib import Path

PAIRS = Path(__file__).parent.parent / "data"
NUM_ROWS = {"train": 1200, "test": 64}
LENGTHS = range(20, 91)  # characters of the German side
SEED = 17

Row = tuple[str, str, str]


def instructions(part: str) -> list[Row]:
    """(page, prompt, completion) of `NUM_ROWS[part]` short pairs of one part of the split."""
    with gzip.open(PAIRS / f"libreoffice-help.en-de.{part}.tsv.gz", "rt", encoding="utf-8", newline="") as lines:
        pairs = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    # German sentences once each: two that differ in English would be one prompt with two answers.
    short = {pair["target"]: pair for pair in pairs if len(pair["target"]) in LENGTHS}
    chosen = random.Random(SEED).sample(sorted(short), NUM_ROWS[part])
    return [(short[german]["page"], f"Translate to English: {german}", short[german]["source"]) for german in chosen]


def write(path: Path, rows: list[Row]) -> None:
    lines = ["\t".join(row) + "\n" for row in [("page", "prompt", "completion"), *rows]]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    train, test = (instructions(part) for part in ("train", "test"))
    asked = {prompt for _, prompt, _ in test}
    write(directory / "train.tsv", [row for row in train if row[1] not in asked])
    write(directory / "test.tsv", test)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
