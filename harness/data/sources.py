"""The rows of one data source of the run file: a file, or a pair of parallel text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.config.schema import DataConfig, DataSource
from harness.data.formats import columns_of
from harness.data.readers import READERS, read_parallel, reader_of
from harness.data.rows import BadRow, Row, nearest_name
from harness.errors import DataError

__all__ = ["READERS", "BadRow", "Row", "as_source", "existing_file", "read_rows", "readable_rows", "source_files"]


def read_rows(source: DataSource, data: DataConfig) -> Iterator[Row | BadRow]:
    """All rows in file order. Raises DataError for a file that is missing, unreadable or without rows."""
    columns = columns_of(source, data)
    files = [existing_file(path) for path in source_files(source)]
    if source.path is not None:
        rows = reader_of(files[0])(files[0], columns)
    else:
        rows = read_parallel(files[0], files[1], columns)
    first = next(rows, None)
    if first is None:
        raise DataError("the file has no rows", where=str(files[0]))
    yield first
    yield from rows


def readable_rows(source: DataSource, data: DataConfig) -> Iterator[Row]:
    """The rows of an evaluation set, where every row is scored. Raises DataError for one that cannot be read."""
    for row in read_rows(source, data):
        if isinstance(row, BadRow):
            raise unscorable(row)
        yield row


def unscorable(row: BadRow) -> DataError:
    """The error of a row of an evaluation set that cannot be used."""
    hint = "every row of a validation or test set is scored: mend this row or delete it"
    return DataError(f"{row.reason}: {row.detail}", where=row.where, hint=hint)


def as_source(source: DataSource | str) -> DataSource:
    """`validation: dev.tsv` is short for `validation: {path: dev.tsv}`."""
    return DataSource(path=source) if isinstance(source, str) else source


def source_files(source: DataSource) -> list[Path]:
    """One file, or the two sides of a parallel pair."""
    return [Path(path) for path in (source.path, source.source, source.target) if path is not None]


def existing_file(path: Path) -> Path:
    """The path itself when it is a file that can be opened. Raises DataError, with the nearest name beside it."""
    try:
        with path.open("rb"):
            return path
    except FileNotFoundError as error:
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest_name(path.name, siblings) or f"a relative path starts at {Path.cwd()}"
        raise DataError("no such file", where=str(path), hint=hint) from error
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", where=str(path)) from error
