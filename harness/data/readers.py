"""Readers of the file formats. A new format is one function and one entry of ``READERS``.

Everything streams in constant memory. A row that cannot be read is a ``BadRow`` and the reader goes on;
a file that cannot be read at all is a ``DataError``.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness.data.formats import Columns
from harness.data.rows import BadRow, Row, is_unicode, nearest_name
from harness.errors import DataError

MAX_LINE_BYTES = 1 << 20
PARQUET_ROWS_PER_READ = 1024
TOO_LONG = f"the line is longer than {MAX_LINE_BYTES:,} bytes"

Reader = Callable[[Path, Columns], Iterator[Row | BadRow]]
Line = tuple[str, str | BadRow]  # file:line, and its text without the line end


def read_tsv(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """A header with column names, then one row a line; tabs separate, quotes are ordinary characters."""
    lines = _lines(path)
    header = _header_line(path, lines).split("\t")
    picked = _pick(path, header, columns)
    for where, line in lines:
        if isinstance(line, BadRow):
            yield line
        elif line:
            yield _row_of_fields(where, line.split("\t"), picked, len(header), columns, line)


def read_csv(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """RFC 4180 with a header line: commas, double quotes, quoted fields may hold line breaks."""
    lines = _CsvLines(path)
    records = csv.reader(lines, strict=True)
    header = _csv_header(path, records)
    picked = _pick(path, header, columns)
    while True:
        first, lines.has_long = records.line_num + 1, False
        where = f"{path}:{first}"
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            for number in range(first, records.line_num + 1):  # a quote left open swallows lines: each counts
                yield BadRow(f"{path}:{number}", "malformed", f"not CSV: {error} (record from line {first})")
            continue
        text = ",".join(fields)
        if lines.has_long:
            yield BadRow(where, "line_too_long", TOO_LONG, text)
        elif not is_unicode(text):
            yield BadRow(where, "not_utf8", "the line is not UTF-8", text)
        elif fields:
            yield _row_of_fields(where, fields, picked, len(header), columns, text)


def read_jsonl(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """One JSON object a line."""
    for where, line in _lines(path):
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            yield _row_of_json(where, line, columns)


def read_parquet(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """Columns of a Parquet file; a null is a missing field."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = _pick_parquet(path, file.schema_arrow, columns)
            for batch in file.iter_batches(PARQUET_ROWS_PER_READ, columns=[name for name in names if name]):
                values = [_texts(batch.column(name)) if name else [None] * len(batch) for name in names]
                for fields in zip(*values, strict=True):
                    number += 1
                    where = f"{path}:{number}"
                    broken = next((field for field in fields if isinstance(field, bytes)), None)
                    if broken is None:
                        yield columns.row(where, fields)
                    else:
                        yield BadRow(where, "not_utf8", "the value is not UTF-8", _printable(broken))
    except (pa.ArrowException, OSError) as error:
        where = f"{path}, after row {number}" if number else str(path)
        raise DataError(f"not a readable Parquet file: {error}", where=where) from error


def read_parallel(source_path: Path, target_path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """Line n of one file belongs to line n of the other. Raises DataError when one file has more lines."""
    num_source = num_target = 0
    for source, target in itertools.zip_longest(_lines(source_path), _lines(target_path)):
        num_source += source is not None
        num_target += target is not None
        if source is None or target is None:
            continue
        bad = next((line for _, line in (source, target) if isinstance(line, BadRow)), None)
        yield bad or columns.row(source[0], (source[1], target[1], *[None] * len(columns.optional)))
    if num_source != num_target:
        raise DataError(
            f"{num_source:,} lines, but {target_path} has {num_target:,}",
            where=str(source_path),
            hint="line n of the one file must be the translation of line n of the other",
        )


READERS: dict[str, Reader] = {".tsv": read_tsv, ".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def reader_of(path: Path) -> Reader:
    """By extension; `.gz` after a text format is fine. Raises DataError for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_compressed = suffixes[-1:] == [".gz"]
    extension = "".join(suffixes[:-1] if is_compressed else suffixes[-1:])
    if extension in READERS and not (is_compressed and extension == ".parquet"):
        return READERS[extension]
    what = f"unknown format `{''.join(suffixes)}`; known: {' '.join(READERS)} (.gz too for text)"
    hint = f"{nearest_name(extension, READERS)} a pair of plain text files is written {{source: FILE, target: FILE}}"
    raise DataError(what, where=str(path), hint=hint.strip())


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end), gunzipped; more than MAX_LINE_BYTES bytes of a line are dropped."""
    number = 0
    try:
        with io.BufferedReader(gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=f"{path}:{number + 1}") from error


def _lines(path: Path) -> Iterator[Line]:
    """UTF-8 taken strictly; a byte order mark at the start of the file is left out."""
    for number, line in _raw_lines(path):
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            yield where, BadRow(where, "line_too_long", TOO_LONG, _printable(line))
            continue
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            detail = f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
            yield where, BadRow(where, "not_utf8", detail, _printable(line))


class _CsvLines:
    """Lines for csv.reader: bytes that are not UTF-8 become lone surrogates; ``has_long`` tells of a line cut off."""

    def __init__(self, path: Path) -> None:
        self.has_long = False
        self._lines = _raw_lines(path)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        if len(line) > MAX_LINE_BYTES:
            self.has_long = True
            return "\n"
        text = line.decode("utf-8", errors="surrogateescape")
        return text.removeprefix("\ufeff") if number == 1 else text


def _header_line(path: Path, lines: Iterator[Line]) -> str:
    _, line = next(lines, ("", None))
    if line is None:
        raise DataError("the file is empty", where=str(path))
    if isinstance(line, BadRow):
        raise DataError(f"the header cannot be read: {line.detail}", where=line.where, hint="save the file as UTF-8")
    return line


def _csv_header(path: Path, records: Iterator[list[str]]) -> list[str]:
    try:
        header = next(records, None)
    except csv.Error as error:
        raise DataError(f"the header cannot be read: {error}", where=f"{path}:1") from error
    if header is None:
        raise DataError("the file is empty", where=str(path))
    if not is_unicode("".join(header)):
        raise DataError("the header cannot be read: not UTF-8", where=f"{path}:1", hint="save the file as UTF-8")
    return header


def _pick(path: Path, header: Sequence[str], columns: Columns) -> list[int | None]:
    """Positions of ``columns.names`` in the header; None for an optional column that is not there."""
    _check_header(f"{path}:1", header, columns)
    return [header.index(name) if name in header else None for name in columns.names]


def _pick_parquet(path: Path, schema: pa.Schema, columns: Columns) -> list[str | None]:
    """``columns.names`` with None for an optional column that is not there."""
    _check_header(str(path), schema.names, columns)
    names = [name if name in schema.names else None for name in columns.names]
    for name in names:
        if name is not None and name not in columns.structured and not _holds_text(schema.field(name).type):
            raise DataError(f"column `{name}` holds {schema.field(name).type}, not text", where=str(path))
    return names


def _check_header(where: str, header: Sequence[str], columns: Columns) -> None:
    for name in columns.names:
        if header.count(name) > 1:
            raise DataError(f"column `{name}` stands in the header more than once", where=where)
    for name in columns.required:
        if name not in header:
            listed = ", ".join(f"`{column[:40]}`" for column in header[:20])
            hint = f"{nearest_name(name, header)} {columns.keys}"
            raise DataError(f"no column `{name}`; the header has {listed}", where=where, hint=hint.strip())


def _row_of_fields(
    where: str, fields: list[str], picked: Sequence[int | None], num_columns: int, columns: Columns, text: str
) -> Row | BadRow:
    if len(fields) != num_columns:
        return BadRow(where, "wrong_column_count", f"{len(fields)} columns, the header has {num_columns}", text)
    return columns.row(where, [None if index is None else fields[index] for index in picked])


def _row_of_json(where: str, line: str, columns: Columns) -> Row | BadRow:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(where, "malformed", f"not JSON: {error}", line)
    if not isinstance(fields, dict):
        return BadRow(where, "malformed", f"not a JSON object but {type(fields).__name__}", line)
    for name in columns.required:
        if name not in fields:
            detail = f"no field `{name}` {nearest_name(name, fields)}".strip()
            return BadRow(where, "missing_field", detail, line)
    return columns.row(where, [fields.get(name) for name in columns.names])


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _texts(column: pa.Array) -> list[str | bytes | None]:
    """The values; those that are not UTF-8 (Parquet does not check) as bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_text(scalar) for scalar in column]


def _text(scalar: pa.Scalar) -> str | bytes | None:
    try:
        value: str | None = scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer())
    return value


def _printable(line: bytes) -> str:
    return line[:1000].decode("utf-8", errors="backslashreplace")
