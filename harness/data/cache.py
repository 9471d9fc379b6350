"""Rows are cleaned and encoded once, into a directory named by everything that decides the outcome.

One process prepares; the others open ``Prepared.rows.directory`` with ``load_rows``. A directory appears by a rename
when it is complete, so a reader never sees half of it; what an interrupted build leaves behind is never read, and the
next build of the same rows removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from harness.config.schema import DataConfig, DataSource
from harness.data.clean import Cleaner, DataReport, bad_row
from harness.data.encoded import Encoded, EncodedRows, RowWriter
from harness.data.leakage import HeldOut
from harness.data.rows import BadRow, Row
from harness.data.sources import existing_file, read_rows, readable_rows, source_files, unscorable
from harness.errors import DataError, ResourceError
from harness.io.atomic import fsync_directory, sha256_file, write_json

__all__ = ["Encode", "Encoded", "EncodedRows", "Prepared", "cache_key", "load_rows", "prepare_rows", "write_reports"]

FORMAT_VERSION = 3
ROWS_PER_BATCH = 4096
QUARANTINE_FILE, REPORT_FILE = "quarantine.jsonl", "data_report.json"
Encode = Callable[[list[Row]], list[tuple[Row, Encoded] | BadRow]]


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, the counts of what was left out, and the file that lists it line by line."""

    rows: EncodedRows
    report: DataReport
    quarantine: Path


def prepare_rows(
    name: str,
    sources: Sequence[DataSource],
    data: DataConfig,
    *,
    encode: Encode,
    fingerprint: str,
    cache_root: Path,
    is_training: bool,
    float_labels: bool = False,
    held_out: HeldOut = frozenset(),
    report_dir: Path | None = None,
) -> Prepared:
    """Clean (training sets only) and encode ``sources``, or open what an earlier call with the same key has made.

    ``held_out`` are the evaluation sources that training rows are compared with. When too many rows are left out,
    report and quarantine are still written to ``report_dir``. Raises DataError (unreadable, empty, too many rows left
    out) and ResourceError (disk full).
    """
    key = cache_key(sources, data, fingerprint, is_training=is_training, held_out=held_out)
    directory, building = cache_root / key, cache_root / f"{key}.building"
    cache_root.mkdir(parents=True, exist_ok=True)
    with _locked(cache_root / f"{key}.lock"), _disk_full_explained(cache_root):
        if not directory.is_dir():
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                with (building / QUARANTINE_FILE).open("w", encoding="utf-8", errors="backslashreplace") as quarantine:
                    cleaner = Cleaner(name, data.cleaning, data.format, held_out, quarantine)
                    with RowWriter(building, with_texts=not is_training, float_labels=float_labels) as writer:
                        _encode_sources(sources, data, encode, cleaner, writer, is_training)
                _refuse_too_many(cleaner, building / QUARANTINE_FILE, report_dir)
                _commit(building, directory)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    rows = load_rows(directory)
    return Prepared(rows, replace(DataReport(**rows.report), name=name), directory / QUARANTINE_FILE)


def load_rows(directory: Path) -> EncodedRows:
    """Open what ``prepare_rows`` has committed. Raises DataError when it is missing or damaged."""
    return EncodedRows(directory)


def write_reports(run_dir: Path, prepared: Iterable[Prepared]) -> None:
    """data_report.json and quarantine.jsonl of all sets."""
    _write_reports(run_dir, [(one.report, one.quarantine) for one in prepared])


def cache_key(
    sources: Sequence[DataSource],
    data: DataConfig,
    fingerprint: str,
    *,
    is_training: bool,
    held_out: HeldOut = frozenset(),
) -> str:
    """64 hexadecimal digits over the files' bytes and names, the task's fingerprint and all settings of a row."""
    not_of_a_row = {"train", "validation", "test", "temperature", "packing", "cleaning"}
    parts = {
        "version": FORMAT_VERSION,
        "is_training": is_training,
        "task": fingerprint,
        "files": [[(str(path), sha256_file(existing_file(path))) for path in source_files(one)] for one in sources],
        "languages": [(one.source_language, one.target_language) for one in sources],
        "data": data.model_dump(exclude=not_of_a_row),
        "cleaning": data.cleaning.model_dump() if is_training else None,
        "held_out": hashlib.sha256(b"".join(sorted(held_out))).hexdigest() if is_training else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encode_sources(
    sources: Sequence[DataSource],
    data: DataConfig,
    encode: Encode,
    cleaner: Cleaner,
    writer: RowWriter,
    is_training: bool,
) -> None:
    for index, source in enumerate(sources):
        num_before = writer.num_rows
        rows = cleaner.clean(read_rows(source, data)) if is_training else cleaner.count(readable_rows(source, data))
        for batch in _batches(rows):
            examples = _whole(encode(batch), cleaner, is_training)
            if is_training:
                examples = _learnable(examples, data, cleaner)
            cleaner.report.truncated += sum(encoded.truncated for _, encoded in examples)
            writer.write(examples, index)
        cleaner.report.rows_per_source.append(writer.num_rows - num_before)
    cleaner.report.rows_kept = writer.num_rows
    writer.finish(cleaner.report.to_json())


def _whole(found: list[tuple[Row, Encoded] | BadRow], cleaner: Cleaner, is_training: bool) -> list[tuple[Row, Encoded]]:
    """The rows that could be encoded."""
    for bad in (one for one in found if isinstance(one, BadRow)):
        if not is_training:
            raise unscorable(bad)
        cleaner.leave_out(bad)
    return [one for one in found if not isinstance(one, BadRow)]


def _learnable(examples: list[tuple[Row, Encoded]], data: DataConfig, cleaner: Cleaner) -> list[tuple[Row, Encoded]]:
    """The examples that are whole, or a text to be classified by its beginning, and have something to learn."""
    limit = f"{data.max_source_length} source or {data.max_target_length} target"
    too_long = f"more than {limit if data.format == 'pairs' and not data.has_prompts else data.max_length} tokens"
    kept = []
    for row, encoded in examples:
        if encoded.truncated and data.format != "labelled":
            cleaner.leave_out(bad_row(row, "too_long", too_long))
        elif encoded.target_size == 0:
            cleaner.leave_out(bad_row(row, "nothing_to_learn", "no token of it is a target"))
        else:
            kept.append((row, encoded))
    return kept


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        yield batch


def _refuse_too_many(cleaner: Cleaner, quarantine: Path, report_dir: Path | None) -> None:
    try:
        cleaner.refuse_too_many()
    except DataError:
        if report_dir is not None:
            _write_reports(report_dir, [(cleaner.report, quarantine)])
        raise


def _write_reports(directory: Path, reports: Sequence[tuple[DataReport, Path]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{QUARANTINE_FILE}.tmp"
    with temporary.open("wb") as whole:
        for _, quarantine in reports:
            with quarantine.open("rb") as part:
                shutil.copyfileobj(part, whole)
    temporary.replace(directory / QUARANTINE_FILE)
    write_json(directory / REPORT_FILE, {report.name: report.to_json() for report, _ in reports})


def _commit(building: Path, directory: Path) -> None:
    for path in building.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_directory(building)
    building.rename(directory)
    fsync_directory(directory.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder per key; the operating system releases the lock of a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_full_explained(cache_root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError("no space left on the disk of the data cache", where=str(cache_root)) from error
