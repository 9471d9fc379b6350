"""Split the LibreOffice help pairs into train, dev and test, page by page.

    python examples/data/make_split.py libreoffice-help.en-de.tsv.gz

Writes ``libreoffice-help.en-de.{train,dev,test}.tsv.gz`` (columns page, source, target) beside this script.  A page is
never split.  Rows of dev that have their source in train, rows of test that have theirs in train or dev, and repeated
rows within dev or test are dropped, so that no score rewards memory.  The same input gives the same bytes.
"""

import argparse
import gzip
import random
from collections.abc import Iterable
from pathlib import Path

SEED = 17
DEV_PAGES = 20
TEST_PAGES = 30
HEADER = "page\tsource\ttarget"

Row = tuple[str, str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows (page, source, target) of the pairs file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        if (header := next(lines).rstrip("\n")) != HEADER:
            raise ValueError(f"{path}: expected the header {HEADER!r}, found {header!r}")
        return [(page, source, target) for page, source, target in (line.rstrip("\n").split("\t") for line in lines)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows; the bytes depend on the rows alone."""
    text = "".join("\t".join(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(f"{HEADER}\n{text}".encode(), mtime=0))


def unseen(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    """The rows whose source is new; their sources are added to the seen ones."""
    kept = []
    for row in rows:
        if row[1] not in seen:
            seen.add(row[1])
            kept.append(row)
    return kept


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Train, dev and test rows, by a seeded shuffle of the page names."""
    pages = sorted({page for page, _, _ in rows})
    random.Random(SEED).shuffle(pages)
    part_of = dict.fromkeys(pages, "train")
    part_of |= dict.fromkeys(pages[:DEV_PAGES], "dev")
    part_of |= dict.fromkeys(pages[DEV_PAGES : DEV_PAGES + TEST_PAGES], "test")
    parts = {part: [row for row in rows if part_of[row[0]] == part] for part in ("train", "dev", "test")}
    seen = {source for _, source, _ in parts["train"]}
    return parts | {part: unseen(parts[part], seen) for part in ("dev", "test")}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="libreoffice-help.en-de.tsv.gz, as make_pairs.py writes it")
    pairs = parser.parse_args().pairs
    for part, rows in split(read_rows(pairs)).items():
        write_rows(Path(__file__).parent / f"libreoffice-help.en-de.{part}.tsv.gz", rows)
        words = [sum(len(row[side].split()) for row in rows) for side in (1, 2)]
        print(f"{part}: {len({row[0] for row in rows})} pages, {len(rows)} rows, {words[0]} en and {words[1]} de words")


if __name__ == "__main__":
    main()
