"""metrics.jsonl: one JSON object a line; see CONTRACT in docs/monitoring.md. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from harness.io.atomic import write_text

Record = dict[str, Any]
RUN_AGAIN = {"step", "evaluation", "skip"}  # what a resumed run does a second time


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, in order; lines that are not whole (torn by a kill, a full disk) are left out."""
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [record for record in records if record is not None]


class MetricsFile:
    """Appends records. Each is one line, handed to the system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts_on_new_line = False

    def rewind(self, resumed_step: int | None) -> list[Record]:
        """Leave out what the run will do again: steps, evaluations and skips after `resumed_step` (None: all of them).

        Returns the records that stay. The file is replaced as a whole or, on an OSError, not at all.
        """
        self._starts_on_new_line = False
        last = -1 if resumed_step is None else resumed_step
        records = read_metrics(self.path)
        kept = [record for record in records if record["event"] not in RUN_AGAIN or record["step"] <= last]
        if self.path.exists():
            write_text(self.path, "".join(_line(record) for record in kept))
        self._starts_on_new_line = True
        return kept

    def append(self, record: Record) -> None:
        """Write one line. Raises OSError; the next line then starts afresh, after whatever was written of this one."""
        data = (("" if self._starts_on_new_line else "\n") + _line(record)).encode("utf-8")
        self._starts_on_new_line = False
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)
        self._starts_on_new_line = True


def _line(record: Record) -> str:
    """NaN and infinity are not JSON: they become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and {"event", "step"} <= record.keys() else None
