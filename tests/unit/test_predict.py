"""What `harness predict` reads: lines, pairs of texts, tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.predict import row_blocks
from harness.config.schema import DataConfig, DataSource
from harness.errors import DataError

PLAIN = DataConfig(format="labelled", train=[DataSource(path="train.tsv")])
PAIRS = PLAIN.model_copy(update={"text_column": "premise", "text_pair_column": "hypothesis"})


def read(path: Path, content: bytes, data: DataConfig) -> list[tuple[str, str | None]]:
    path.write_bytes(content)
    return [(row.source, row.source_pair) for block in row_blocks(path, data) for row in block]


def test_every_line_is_a_text_even_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", "one\n\nzwölf\tx\r\nlast".encode(), PLAIN) == [
        ("one", None), ("", None), ("zwölf\tx", None), ("last", None),
    ]  # fmt: skip


def test_two_texts_are_parted_by_the_first_tab(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", b"one\ttwo\tthree\n", PAIRS) == [("one", "two\tthree")]
    with pytest.raises(DataError, match="line 2: the model reads two texts, parted by a tab"):
        read(tmp_path / "a.txt", b"one\ttwo\nthree\n", PAIRS)


def test_a_table_is_read_by_its_columns_and_needs_no_labels(tmp_path: Path) -> None:
    table = b"hypothesis,id,premise\nb,1,a\n"
    assert read(tmp_path / "a.CSV", table, PAIRS) == [("a", "b")]
    with pytest.raises(DataError, match=r"(?s)no column `text`.*--text-column"):
        read(tmp_path / "a.csv", table, PLAIN)


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tsv:3: wrong_column_count"):
        read(tmp_path / "a.tsv", b"text\tid\nfine\t1\nbroken\n", PLAIN)
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "a.txt", b"fine\n\xff\n", PLAIN)
    with pytest.raises(DataError, match="no such file"):
        list(row_blocks(tmp_path / "b.txt", PLAIN))
