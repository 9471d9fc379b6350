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
    """A directory of files {"key": `key`, "seconds": of decoding, "rows": {row: its outputs}}; files of another key do
    not count.

    `key` names everything that decides outputs; `decode_and_score` adds rows and search. Each start of the evaluation
    adds files of its own and overwrites none. Their number of ranks may differ.
    """

    directory: Path
    key: str
    processes: Processes
    num_before: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    written: float = field(default_factory=time.monotonic)

    def read(self) -> dict[int, Any]:
        """Outputs by row, as rank 0 finds them. A collective."""
        rows: dict[str, Any] = {}
        self.started = time.monotonic()
        seconds: dict[str, float] = {}  # of the slowest rank of each start
        if self.processes.is_first:
            for file in self.directory.glob("after-*.json"):
                content, start = read_json(file), file.name.partition("-rank-")[0]
                if content["key"] == self.key:
                    rows |= content["rows"]
                    seconds[start] = max(seconds.get(start, 0.0), content["seconds"])
        rows, self.seconds_before = self.processes.gather((rows, sum(seconds.values())))[0]
        self.num_before = len(rows)
        return {int(row): outputs for row, outputs in rows.items()}

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.written >= WRITE_EVERY_S

    def write(self, rows: Mapping[int, Any]) -> None:
        """Keep what this rank has decoded in this start; what a full disk does not take is decoded again."""
        name = f"after-{self.num_before}-rank-{self.processes.rank}.json"
        content = {"key": self.key, "seconds": time.monotonic() - self.started, "rows": rows}
        with contextlib.suppress(OSError):
            write_text(self.directory / name, json.dumps(content, ensure_ascii=False))
        self.written = time.monotonic()

    def remove(self) -> None:
        """What the rows were for is written."""
        if self.processes.is_first:
            shutil.rmtree(self.directory, ignore_errors=True)

    def remove_others(self, pattern: str) -> None:
        """Those beside it whose evaluation will not be made again."""
        if self.processes.is_first:
            for other in self.directory.parent.glob(pattern):
                if other != self.directory:
                    shutil.rmtree(other, ignore_errors=True)
