"""Leakage: training rows whose source also stands in the validation or test set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from harness.config.schema import DataConfig, DataSource
from harness.data.rows import Row
from harness.data.sources import readable_rows

HeldOut = frozenset[bytes]


def source_digest(text: str) -> bytes:
    """16 bytes that are equal for sources that differ only in case and white space."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=16).digest()


def row_source_digest(row: Row) -> bytes:
    """Digest of everything the model reads of a row."""
    return source_digest(f"{row.source}\0{row.source_pair}" if row.source_pair else row.source)


def held_out_sources(sources: Iterable[DataSource], data: DataConfig) -> HeldOut:
    """Digests of all sources of the evaluation sets. Raises DataError for a row that cannot be read."""
    return frozenset(row_source_digest(row) for source in sources for row in readable_rows(source, data))
