"""Encoded rows on disk: an Arrow file written through `datasets`, row sizes beside it as .npy, and meta.json.

- rows.arrow: input_ids (list of int32), labels (list of int32, or of float32 for regression), marker (int32),
  source_index (int16); evaluation sets also TEXT_COLUMNS (texts as they were read)
- source_sizes.npy, target_sizes.npy: tokens of input_ids, and how much of labels the loss is summed over;
  int32 [num_rows]
- meta.json: num_rows, digest, and the data report
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from harness.data.rows import Row
from harness.errors import DataError
from harness.io.atomic import read_json, write_json

Int32Array = NDArray[np.int32]
Lists = tuple[Int32Array, NDArray[Any]]  # offsets and values
Example = tuple[Int32Array, NDArray[Any], int]  # input_ids, labels, marker
TEXT_COLUMNS = ("source", "target", "source_language", "target_language", "source_pair", "constraints", "where")
TEXT_SCHEMA = pa.schema({name: pa.large_string() for name in TEXT_COLUMNS})
ROWS_FILE, META_FILE = "rows.arrow", "meta.json"
SOURCE_SIZES_FILE, TARGET_SIZES_FILE = "source_sizes.npy", "target_sizes.npy"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row in numbers; ``truncated`` when a side was longer than its limit and has been cut.

    ``marker`` is one number that a task may need (translation: the decoder's first token). ``num_targets`` is how many
    labels the loss is summed over, None if all of them.
    """

    input_ids: list[int]
    labels: list[int] | list[float]
    marker: int = 0
    truncated: bool = False
    num_targets: int | None = None

    @property
    def target_size(self) -> int:
        return len(self.labels) if self.num_targets is None else self.num_targets


class RowWriter:
    """Streams encoded rows into a directory; ``finish`` completes it. Holds 8 bytes per row in memory.

    ``digest`` depends on tokens and their order only, not on paths, texts or the sizes of the batches written.
    """

    def __init__(self, directory: Path, *, with_texts: bool, float_labels: bool = False) -> None:
        numbers = {
            "input_ids": pa.list_(pa.int32()),
            "labels": pa.list_(pa.float32() if float_labels else pa.int32()),
            "marker": pa.int32(),
            "source_index": pa.int16(),
        }
        self.num_rows = 0
        self._directory = directory
        self._schema = pa.schema([*pa.schema(numbers), *(TEXT_SCHEMA if with_texts else ())])
        self._writer = ArrowWriter(schema=self._schema, path=str(directory / ROWS_FILE))
        self._sizes = {SOURCE_SIZES_FILE: array("i"), TARGET_SIZES_FILE: array("i")}
        self._digests = {name: hashlib.sha256() for name in numbers}

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.stream.close()

    def write(self, examples: Sequence[tuple[Row, Encoded]], source_index: int) -> None:
        columns: dict[str, list[Any]] = {
            "input_ids": [encoded.input_ids for _, encoded in examples],
            "labels": [encoded.labels for _, encoded in examples],
            "marker": [encoded.marker for _, encoded in examples],
            "source_index": [source_index] * len(examples),
        }
        for name in self._schema.names[len(columns) :]:
            columns[name] = [getattr(row, name) for row, _ in examples]
        table = pa.table(columns, schema=self._schema)
        for name, digest in self._digests.items():
            digest.update(_values(table.column(name).combine_chunks()).tobytes())
        self._sizes[SOURCE_SIZES_FILE].extend(len(encoded.input_ids) for _, encoded in examples)
        self._sizes[TARGET_SIZES_FILE].extend(encoded.target_size for _, encoded in examples)
        self._writer.write_table(table)
        self.num_rows += len(examples)

    def finish(self, report: dict[str, Any]) -> None:
        """Write everything beside the rows. Without rows there is nothing to read back and no file is complete."""
        if self.num_rows == 0:
            return
        self._writer.finalize()
        digest = hashlib.sha256(b"".join(part.digest() for part in self._digests.values()))
        for name, sizes in self._sizes.items():
            values = np.array(sizes, dtype=np.int32)
            digest.update(values.tobytes())
            np.save(self._directory / name, values)
        meta = {"num_rows": self.num_rows, "digest": digest.hexdigest(), "report": report}
        write_json(self._directory / META_FILE, meta)


class EncodedRows:
    """Encoded rows of one directory, memory-mapped: opening and taking rows reads only what is asked for."""

    def __init__(self, directory: Path) -> None:
        meta = read_json(directory / META_FILE)
        self.directory = directory
        self.digest: str = meta["digest"]
        self.report: dict[str, Any] = meta["report"]
        try:
            self.source_sizes: Int32Array = np.load(directory / SOURCE_SIZES_FILE, mmap_mode="r")
            self.target_sizes: Int32Array = np.load(directory / TARGET_SIZES_FILE, mmap_mode="r")
            self._table: pa.Table = Dataset.from_file(str(directory / ROWS_FILE)).data.table
        except (OSError, EOFError, ValueError, pa.ArrowException) as error:
            raise _damaged(directory, str(error)) from error
        lengths = {meta["num_rows"], len(self.source_sizes), len(self.target_sizes), self._table.num_rows}
        if len(lengths) > 1:
            raise _damaged(directory, f"its files have {sorted(lengths)} rows")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def take(self, row_ids: Sequence[int] | NDArray[np.integer]) -> list[Example]:
        """(input_ids, labels, marker) of each row id, in the order asked for; the arrays are read-only views."""
        ids = np.asarray(row_ids, dtype=np.int64)
        chunk_of_row = np.searchsorted(self._chunk_starts, ids, side="right") - 1
        places = ids - self._chunk_starts[chunk_of_row]
        examples = []
        for chunk, place in zip(chunk_of_row.tolist(), places.tolist(), strict=True):
            inputs, labels, markers = self._chunks[chunk]
            examples.append((_piece(inputs, place), _piece(labels, place), int(markers[place])))
        return examples

    @property
    def sizes(self) -> Int32Array:
        """What each row costs: the tokens of its longer side, int32 [num_rows]."""
        return np.maximum(self.source_sizes, self.target_sizes)

    @property
    def source_index(self) -> NDArray[np.int16]:
        """Which training source each row comes from, int16 [num_rows]."""
        return np.asarray(self._table.column("source_index").to_numpy())

    def texts(self, column: str) -> list[Any]:
        """One of TEXT_COLUMNS of an evaluation set, as read from the file; languages may be None."""
        return list(self._table.column(column).to_pylist())

    @cached_property
    def _chunks(self) -> list[tuple[Lists, Lists, Int32Array]]:
        columns = [self._table.column(name).chunks for name in ("input_ids", "labels", "marker")]
        return [
            (_offsets_and_values(inputs), _offsets_and_values(labels), markers.to_numpy())
            for inputs, labels, markers in zip(*columns, strict=True)
        ]

    @cached_property
    def _chunk_starts(self) -> NDArray[np.int64]:
        lengths = [len(chunk) for chunk in self._table.column("marker").chunks]
        return np.cumsum([0, *lengths[:-1]], dtype=np.int64)


def _values(column: pa.Array) -> NDArray[Any]:
    values = column.flatten() if pa.types.is_list(column.type) else column
    return np.asarray(values.to_numpy())


def _offsets_and_values(lists: pa.ListArray) -> Lists:
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _piece(lists: Lists, place: int) -> NDArray[Any]:
    offsets, values = lists
    return values[offsets[place] : offsets[place + 1]]


def _damaged(directory: Path, why: str) -> DataError:
    return DataError(f"the cached rows are damaged: {why}", where=str(directory), hint="delete this directory")
