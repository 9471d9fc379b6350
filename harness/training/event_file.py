"""TensorBoard event files, written as they come and without a thread, so that an error shows where it happens."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, image, text


class EventFile:
    """One attempt's event file in `directory`. TensorBoard forgets what earlier attempts wrote from `first_step` on.

    Files are numbered: TensorBoard reads them in the order of their names, and a clock may be wrong after a restart on
    another machine. Every method raises OSError when nothing can be written; the next call then opens a new file, since
    readers stop at a torn record.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory = directory
        self._descriptor: int | None = None
        self._opening = [
            Event(file_version="brain.Event:2"),
            Event(session_log=SessionLog(status=SessionLog.START), step=first_step),
        ]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each curve: tag -> value."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(summary=Summary(value=points), step=step))

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._write(Event(summary=text(tag, markdown), step=step))

    def image(self, step: int, tag: str, picture: NDArray[np.uint8]) -> None:
        """A picture [height, width, 3]."""
        self._write(Event(summary=image(tag, picture, dataformats="HWC"), step=step))

    def hyper_parameters(self, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The run's settings (dotted names) and the tags to compare runs by, for TensorBoard's HPARAMS page."""
        for summary in hparams(flatten(config), dict.fromkeys(metrics, 0.0)):
            self._write(Event(summary=summary))

    def _write(self, event: Event) -> None:
        events = [event]
        if self._descriptor is None:
            self._descriptor = self._open()
            events = [*self._opening, event]
        packed = io.BytesIO()
        for one in events:
            one.wall_time = time.time()
            RecordWriter(packed).write(one.SerializeToString())
        data = packed.getvalue()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            self.close()
            raise
        self._opening = self._opening[:1]  # a later file of this attempt takes nothing back

    def _open(self) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        number = len(list(self.directory.glob("events.out.tfevents.*")))
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        return os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings under dotted names; lists become JSON, what is null is left out."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
        elif value is not None:
            flat[prefix + key] = json.dumps(value, ensure_ascii=False)
    return flat


def sample_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """(source, reference, output) rows as a Markdown table; nothing in the texts acts as markup."""
    lines = ["| source | reference | output |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows])


def _cell(text: str) -> str:
    """Markdown's signs as character references, which it shows and does not obey."""
    plain = escape(" ".join(text.split()), quote=False)
    return "".join(f"&#{ord(sign)};" if sign in r"|\`*_[]~" else sign for sign in plain)
