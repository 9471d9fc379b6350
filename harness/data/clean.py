"""Which training rows are left out, and the report that says so. Evaluation sets are never cleaned."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from harness.config.schema import CleaningConfig
from harness.data.leakage import HeldOut, row_source_digest
from harness.data.rows import BadRow, Row
from harness.errors import DataError

MAX_QUARANTINE_CHARACTERS = 200
SIDES = {
    "pairs": ("source", "target"),
    "text": ("text", ""),
    "prompt": ("prompt", "completion"),
    "messages": ("part before the answer", "answer"),
    "labelled": ("text", "label"),
}
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but tab, LF, CR, NEL


def control_character(row: Row) -> str | None:
    """The first character that no text should have."""
    found = CONTROL_CHARACTERS.search(row.source) or CONTROL_CHARACTERS.search(row.target)
    return found.group() if found else None


def length_ratio(row: Row) -> float:
    """The longer side over the shorter one, in characters; neither may be empty."""
    shorter, longer = sorted((len(row.source.strip()), len(row.target.strip())))
    return longer / shorter


def is_copy(row: Row) -> bool:
    """The target is the source, though the languages differ or are not known."""
    same_language = row.source_language is not None and row.source_language == row.target_language
    return not same_language and row.source.strip() == row.target.strip()


def row_digest(row: Row) -> bytes:
    """16 bytes that are equal for equal rows: all texts and both languages."""
    key = "\0".join(
        (row.source, row.target, row.source_language or "", row.target_language or "", row.source_pair or "")
    )
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def fault_of(row: Row, cleaning: CleaningConfig, row_format: str = "pairs") -> tuple[str, str] | None:
    """(reason, detail) when the row by itself should be left out. Only the sides of `pairs` are compared."""
    if not row.source.strip() or (not row.target.strip() and row_format != "text"):
        source, target = SIDES[row_format]
        return "empty", f"the {source if not row.source.strip() else target} is empty"
    if character := control_character(row):
        return "control_characters", f"U+{ord(character):04X}"
    if row_format != "pairs":
        return None
    if cleaning.max_length_ratio is not None and length_ratio(row) > cleaning.max_length_ratio:
        return "length_ratio", f"{len(row.source.strip())} to {len(row.target.strip())} characters"
    if cleaning.drop_copies and is_copy(row):
        return "copy", "the target is the source"
    return None


@dataclass
class DataReport:
    """Counts of one data set: read = kept + left out.

    ``leaked`` rows are training rows whose source is also an evaluation source, kept or not; ``truncated`` rows are
    evaluation rows whose tokens were cut to the length limit.
    """

    name: str
    rows_read: int = 0
    rows_kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    leaked: int = 0
    truncated: int = 0
    rows_per_source: list[int] = field(default_factory=list)

    @property
    def num_left_out(self) -> int:
        return sum(self.left_out.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.left_out.items()))
        return f"{self.rows_read:,} rows read, {self.rows_kept:,} kept; left out: {counts or 'none'}"


class Cleaner:
    """Passes on the good rows of a training set; counts the others in ``report`` and writes them to ``quarantine``.

    Memory: a digest per row (about 100 bytes) when duplicates are dropped, nothing else.
    """

    def __init__(
        self, name: str, cleaning: CleaningConfig, row_format: str, held_out: HeldOut, quarantine: TextIO
    ) -> None:
        self.report = DataReport(name)
        self.examples: dict[str, str] = {}
        self._cleaning, self._held_out, self._quarantine = cleaning, held_out, quarantine
        self._row_format = row_format
        self._seen: set[bytes] = set()

    def clean(self, rows: Iterator[Row | BadRow]) -> Iterator[Row]:
        for row in rows:
            self.report.rows_read += 1
            if isinstance(row, BadRow):
                self.leave_out(row)
                continue
            fault = fault_of(row, self._cleaning, self._row_format) or self._fault_among_rows(row)
            if fault is None:
                yield row
            else:
                self.leave_out(bad_row(row, *fault))

    def count(self, rows: Iterator[Row]) -> Iterator[Row]:
        """All rows of an evaluation set."""
        for row in rows:
            self.report.rows_read += 1
            yield row

    def leave_out(self, bad: BadRow) -> None:
        self.report.left_out[bad.reason] = self.report.left_out.get(bad.reason, 0) + 1
        self.examples.setdefault(bad.reason, f"{bad.where}: {bad.reason}: {bad.detail}")
        record = asdict(bad) | {"text": bad.text[:MAX_QUARANTINE_CHARACTERS]}
        self._quarantine.write(json.dumps(record, ensure_ascii=False) + "\n")

    def refuse_too_many(self) -> None:
        """Raises DataError when nothing is left or more than max_bad_fraction was left out."""
        report, limit = self.report, self._cleaning.max_bad_fraction
        if report.rows_kept and report.num_left_out <= limit * report.rows_read:
            return
        what = "no row is left" if not report.rows_kept else f"more than {limit:.0%} of the rows are left out"
        first = "".join(f"\n  first: {example}" for example in self.examples.values())
        hint = "mend the file, or change data.cleaning"
        raise DataError(f"{what}: {report.summary()}{first}", where=f"{report.name} data", hint=hint)

    def _fault_among_rows(self, row: Row) -> tuple[str, str] | None:
        """Duplicates and leakage."""
        if self._cleaning.drop_duplicates:
            digest = row_digest(row)
            if digest in self._seen:
                return "duplicate", "an equal row stands before it"
            self._seen.add(digest)
        if self._held_out and row_source_digest(row) in self._held_out:
            self.report.leaked += 1
            if self._cleaning.drop_leaked:
                return "leaked", "the source stands in validation or test"
        return None


def bad_row(row: Row, reason: str, detail: str) -> BadRow:
    return BadRow(row.where, reason, detail, f"{row.source}\t{row.target}")
