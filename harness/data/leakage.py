"""Leakage: training rows whose source also stands in the validation or test set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from harness.config.schema import DataConfig, DataSource
from harness.data.sources import readable_rows

HeldOut = frozenset[bytes]


def source_digest(text: str) -> bytes:
    """16 bytes that are equal for sources that differ only in case and white space."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=16).digest()


def held_out_sources(sources: Iterable[DataSource], data: DataConfig) -> HeldOut:
    """Digests of all sources of the evaluation sets. Raises DataError for a row that cannot be read."""
    return frozenset(source_digest(row.source) for source in sources for row in readable_rows(source, data))
