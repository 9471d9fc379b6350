"""The pretraining file of a small mBART: translation in both directions, and denoising.

    python examples/pretrain/mix.py CORPORA_DIR OUT_DIR --seed 17

CORPORA_DIR is what corpora.py wrote.  OUT_DIR gets ``train.tsv.gz`` and ``valid.tsv.gz`` with the columns source,
target, source_language, target_language (mBART's codes).  A denoising row has equal languages; its source is the target
with spans of words masked, after Liu et al. 2020, "Multilingual Denoising Pre-training for Neural Machine Translation":
35 % of the words, in spans of Poisson(3.5) words, each replaced by one ``<mask>``.
"""

import argparse
import gzip
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

CODES = {"en": "en_XX", "de": "de_DE", "fr": "fr_XX"}
REVERSED_SHARE = 1 / 5  # of the en-de pairs, also as de->en
FRENCH_SHARE = 1 / 10  # of the en-fr pairs
DENOISING_SHARE = 3 / 20  # of all rows
MASK = "<mask>"
MASKED_SHARE = 0.35
MEAN_SPAN = 3.5
MIN_DENOISING_WORDS = 6

Item = TypeVar("Item")
Row = tuple[str, str, str, str]
HEADER: Row = ("source", "target", "source_language", "target_language")


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs of a TSV file with the header source, target."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        next(lines)
        return [(source, target) for source, target in (line.rstrip("\n").split("\t") for line in lines)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a TSV file with the header; its bytes depend on the rows alone."""
    text = "".join("\t".join(row) + "\n" for row in chain([HEADER], rows))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def masked(text: str, rng: np.random.Generator) -> str:
    """The text with about MASKED_SHARE of its words in random spans, each span replaced by one mask."""
    words = text.split()
    budget = max(1, round(MASKED_SHARE * len(words)))
    hidden = np.zeros(len(words), dtype=bool)
    while (left := budget - int(hidden.sum())) > 0:
        span = min(max(1, int(rng.poisson(MEAN_SPAN))), left)
        start = int(rng.integers(len(words) - span + 1))
        hidden[start : start + span] = True
    begins = hidden & ~np.concatenate([[False], hidden[:-1]])
    marked = zip(words, hidden, begins, strict=True)
    return " ".join(MASK if hide else word for word, hide, begin in marked if begin or not hide)


def translation(pairs: Iterable[tuple[str, str]], source: str, target: str) -> list[Row]:
    """The pairs as rows of one direction."""
    return [(s, t, CODES[source], CODES[target]) for s, t in pairs]


def sample(items: list[Item], share: float, rng: np.random.Generator) -> list[Item]:
    """A random share of the items."""
    return [items[i] for i in rng.permutation(len(items))[: round(share * len(items))]]


def denoising(texts: Iterable[str], language: str, rng: np.random.Generator) -> list[Row]:
    """Rows that ask for the text behind its masks."""
    return [(masked(text, rng), text, CODES[language], CODES[language]) for text in texts]


def mix(german: list[tuple[str, str]], french: list[tuple[str, str]], rng: np.random.Generator) -> list[Row]:
    """All rows in random order: en->de, de->en, en->fr, and denoising of de and en in equal parts."""
    rows = translation(german, "en", "de")
    rows += translation(((t, s) for s, t in sample(german, REVERSED_SHARE, rng)), "de", "en")
    rows += translation(sample(french, FRENCH_SHARE, rng), "en", "fr")
    wanted = round(len(rows) * DENOISING_SHARE / (1 - DENOISING_SHARE))
    for side, language in enumerate(("en", "de")):
        texts = sorted({pair[side] for pair in german if len(pair[side].split()) >= MIN_DENOISING_WORDS})
        rows += denoising(sample(texts, min(1.0, wanted / 2 / len(texts)), rng), language, rng)
    return [rows[i] for i in rng.permutation(len(rows))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, metavar="CORPORA_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    german, french = (read_pairs(arguments.corpora / f"en-{language}.tsv.gz") for language in ("de", "fr"))
    rows = mix(german, french, np.random.default_rng(arguments.seed))
    valid = translation(read_pairs(arguments.corpora / "dev.en-de.tsv.gz"), "en", "de")
    write_rows(arguments.out / "train.tsv.gz", rows)
    write_rows(arguments.out / "valid.tsv.gz", valid)
    print(
        f"train {len(rows):,} rows, {sum(len(row[1].split()) for row in rows):,} target words; valid {len(valid)} rows"
    )


if __name__ == "__main__":
    main()
