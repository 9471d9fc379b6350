"""Rows that an evaluation has decoded when it is interrupted, kept for the next start."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.engine.processes import Processes
from harness.io.atomic import read_json, write_text

WRITE_EVERY_S = 60.0


@dataclass
class Partial:
    """A directory of files {"key": `key`, "rows": {row: its outputs}}; files of another key do not count.

    Each start of the evaluation adds files of its own and overwrites none. Their number of ranks may differ.
    """

    directory: Path
    key: str
    processes: Processes
    num_before: int = 0
    written: float = field(default_factory=time.monotonic)

    def read(self) -> dict[int, Any]:
        """Outputs by row, as rank 0 finds them; those of other evaluations are deleted. A collective."""
        rows: dict[str, Any] = {}
        if self.processes.is_first:
            for other in self.directory.parent.glob(".*.partial"):
                if other != self.directory:
                    shutil.rmtree(other, ignore_errors=True)
            for file in self.directory.glob("after-*.json"):
                content = read_json(file)
                if content["key"] == self.key:
                    rows |= content["rows"]
        rows = self.processes.gather(rows)[0]
        self.num_before = len(rows)
        return {int(row): outputs for row, outputs in rows.items()}

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.written >= WRITE_EVERY_S

    def write(self, rows: Mapping[int, Any]) -> None:
        """Keep what this rank has decoded in this start; what a full disk does not take is decoded again."""
        name = f"after-{self.num_before}-rank-{self.processes.rank}.json"
        with contextlib.suppress(OSError):
            write_text(self.directory / name, json.dumps({"key": self.key, "rows": rows}, ensure_ascii=False))
        self.written = time.monotonic()

    def remove(self) -> None:
        """All rows are decoded, on every rank."""
        if self.processes.is_first:
            shutil.rmtree(self.directory, ignore_errors=True)
