"""Cleaning: each reason by itself, the counts, the quarantine, leakage and the limit."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.schema import CleaningConfig, DataConfig, DataSource
from harness.data.clean import Cleaner, fault_of, is_copy, length_ratio, row_digest
from harness.data.leakage import held_out_sources, source_digest
from harness.data.rows import BadRow, Row
from harness.errors import DataError


def row(source: str, target: str, line: int = 1, languages: tuple[str | None, str | None] = ("en", "de")) -> Row:
    return Row(f"train.tsv:{line}", source, target, *languages)


def clean(rows: Sequence[Row | BadRow], **cleaning: Any) -> tuple[list[Row], Cleaner, list[dict[str, str]]]:
    held_out = cleaning.pop("held_out", frozenset())
    quarantine = io.StringIO()
    cleaner = Cleaner("train", CleaningConfig(**cleaning), "pairs", held_out, quarantine)
    kept = list(cleaner.clean(iter(rows)))
    cleaner.report.rows_kept = len(kept)
    return kept, cleaner, [json.loads(line) for line in quarantine.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ("a house", "ein Haus", None),
        ("", "ein Haus", ("empty", "the source is empty")),
        (" \u00a0\n", "ein Haus", ("empty", "the source is empty")),
        ("a house", "\t", ("empty", "the target is empty")),
        ("", "", ("empty", "the source is empty")),
        ("a\x07", "b", ("control_characters", "U+0007")),
        ("a", "b\x9f", ("control_characters", "U+009F")),
        ("a\x7f", "b", ("control_characters", "U+007F")),
        ("one\ttwo\r\nthree\u0085", "eins zwei drei", None),
        ("x", "y" * 9, None),
        ("x", "y" * 10, ("length_ratio", "1 to 10 characters")),
        ("x" * 10, " y ", ("length_ratio", "10 to 1 characters")),
        ("LibreOffice", " LibreOffice", ("copy", "the target is the source")),
    ],
)
def test_fault_of_a_row(source: str, target: str, fault: tuple[str, str] | None) -> None:
    assert fault_of(row(source, target), CleaningConfig()) == fault


def test_checks_can_be_switched_off() -> None:
    off = CleaningConfig(max_length_ratio=None, drop_copies=False, drop_duplicates=False)
    assert fault_of(row("x", "y" * 99), off) is None
    assert fault_of(row("x", "x"), off) is None
    assert len(clean([row("a", "b"), row("a", "b")], drop_duplicates=False)[0]) == 2


@pytest.mark.parametrize(
    ("languages", "copy"), [(("en", "de"), True), (("en", "en"), False), ((None, None), True), (("en", None), True)]
)
def test_a_copy_is_fine_within_one_language(languages: tuple[str | None, str | None], copy: bool) -> None:
    assert is_copy(row("a", "a", languages=languages)) is copy


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_length_ratio_is_symmetric_and_at_least_one(one: str, other: str) -> None:
    assert length_ratio(row(one, other)) == length_ratio(row(other, one)) >= 1


def test_duplicates_are_equal_texts_and_languages() -> None:
    assert row_digest(row("a", "b", 1)) == row_digest(row("a", "b", 2))
    different = [row("a", "b"), row("ab", ""), row("a", "b", languages=("en", "fr")), row("b", "a"), row("A", "b")]
    assert len({row_digest(one) for one in different}) == len(different)


def test_counts_add_up_and_quarantine_has_place_and_text() -> None:
    rows = [
        row("a", "b", 2),
        BadRow("train.tsv:3", "not_utf8", "byte 1", "\\xff"),
        row("a", "b", 4),
        row("", "b", 5),
        row("x" * 500, "y" * 499, 6),
        row("x" * 500, "x" * 500, 7),
    ]
    kept, cleaner, quarantine = clean(rows)
    assert [one.where for one in kept] == ["train.tsv:2", "train.tsv:6"]
    report = cleaner.report
    assert report.rows_read == report.rows_kept + report.num_left_out == 6
    assert report.left_out == {"not_utf8": 1, "duplicate": 1, "empty": 1, "copy": 1}
    assert [(one["where"], one["reason"]) for one in quarantine] == [
        ("train.tsv:3", "not_utf8"),
        ("train.tsv:4", "duplicate"),
        ("train.tsv:5", "empty"),
        ("train.tsv:7", "copy"),
    ]
    assert quarantine[3]["text"] == "x" * 200
    assert quarantine[0] == {"where": "train.tsv:3", "reason": "not_utf8", "detail": "byte 1", "text": "\\xff"}


@pytest.mark.parametrize(("drop_leaked", "kept"), [(False, 3), (True, 1)])
def test_leaked_rows_are_counted_and_dropped_only_on_request(drop_leaked: bool, kept: int) -> None:
    held_out = frozenset({source_digest("Open the  file.")})
    rows = [row("open the file. ", "Auf", 1), row("Open the file.", "auf", 2), row("Close the file.", "zu", 3)]
    kept_rows, cleaner, quarantine = clean(rows, drop_leaked=drop_leaked, held_out=held_out)
    assert (len(kept_rows), cleaner.report.leaked, len(quarantine)) == (kept, 2, 3 - kept)
    assert cleaner.report.left_out == ({"leaked": 2} if drop_leaked else {})


def test_held_out_sources_of_several_sets(tmp_path: Path) -> None:
    for name, text in (("dev", "A b"), ("test", "c")):
        (tmp_path / f"{name}.tsv").write_text(f"source\ttarget\n{text}\tx\n")
    sources = [DataSource(path=str(tmp_path / f"{name}.tsv")) for name in ("dev", "test")]
    data = DataConfig(train=sources[:1])
    assert held_out_sources(sources, data) == {source_digest("a B"), source_digest("c")}


def test_limit_on_rows_left_out() -> None:
    rows = [row(str(i), "x" if i >= 2 else "", i) for i in range(10)]
    clean(rows, max_bad_fraction=0.2)[1].refuse_too_many()
    with pytest.raises(DataError) as caught:
        clean(rows, max_bad_fraction=0.1)[1].refuse_too_many()
    assert str(caught.value).splitlines() == [
        "train data: more than 10% of the rows are left out: 10 rows read, 8 kept; left out: empty 2",
        "  first: train.tsv:0: empty: the target is empty",
        "  -> mend the file, or change data.cleaning",
    ]


def test_everything_filtered() -> None:
    with pytest.raises(DataError, match="no row is left: 2 rows read, 0 kept; left out: copy 1, empty 1"):
        clean([row("", "x"), row("y", "y")], max_bad_fraction=0.99)[1].refuse_too_many()
