"""What ranks print: whole in a log file each, rank 0's on the terminal too. Neither a full disk nor a stopped terminal
holds a rank up."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

_CHUNK_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 1 << 16
_MOST_WAITING_CHUNKS = 4096


def _write_whole(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class Terminal:
    """Our standard output and error, written by a thread; what a stopped terminal cannot take is dropped in the end.

    `write_whole(descriptor, data)`: another place to write what is meant for descriptor 1 or 2.
    """

    def __init__(self, write_whole: Callable[[int, bytes], None] = _write_whole) -> None:
        self._write_whole = write_whole
        self._waiting: queue.Queue[tuple[int, bytes] | None] = queue.Queue(_MOST_WAITING_CHUNKS)
        self._thread = threading.Thread(target=self._write_all, daemon=True, name="terminal")
        self._thread.start()

    def write(self, data: bytes, descriptor: int = 1) -> None:
        with suppress(queue.Full):
            self._waiting.put_nowait((descriptor, data))

    def say(self, message: str) -> None:
        """A line of the supervisor's own, on standard error."""
        self.write(f"{message}\n".encode(), descriptor=2)

    def close(self, patience_s: float = 5.0) -> None:
        """Wait until everything is written, or no longer than `patience_s`."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=patience_s)
        self._thread.join(patience_s)

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            with suppress(OSError):  # the reader is gone: the logs have it all
                self._write_whole(*item)


class RankOutput:
    """The pipe that is one rank's standard output and error."""

    def __init__(self, pipe: IO[bytes], log_path: Path, terminal: Terminal | None) -> None:
        self._pipe, self._terminal = pipe, terminal
        self._log: IO[bytes] | None = log_path.open("ab", buffering=0)
        self._partial = b""
        os.set_blocking(pipe.fileno(), False)

    def fileno(self) -> int:
        return self._pipe.fileno()

    def copy(self) -> bool:
        """Copy what is there now; False once the pipe is closed at the other end."""
        chunk = self._read()
        if chunk:
            self._write(chunk)
        return chunk != b""

    def close(self) -> None:
        while chunk := self._read():
            self._write(chunk)
        self._write_log(_last_state(self._partial))
        self._pipe.close()
        if self._log is not None:
            self._log.close()

    def _read(self) -> bytes | None:
        """None when there is nothing yet, empty at the end."""
        try:
            return os.read(self._pipe.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return None

    def _write(self, chunk: bytes) -> None:
        if self._terminal is not None:
            self._terminal.write(chunk)
        self._write_log(self._whole_lines(chunk))

    def _whole_lines(self, chunk: bytes) -> bytes:
        """The lines now complete, without the states of a progress bar that a carriage return has overwritten."""
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) > _LONGEST_LINE_BYTES:
            lines, self._partial = [*lines, self._partial], b""
        return b"".join(_last_state(line) + b"\n" for line in lines)

    def _write_log(self, data: bytes) -> None:
        if self._log is None:
            return
        try:
            self._log.write(data)
        except OSError as error:
            if self._terminal is not None:
                self._terminal.say(f"harness: {self._log.name} ends here: {error.strerror}")
            self._log.close()
            self._log = None


def _last_state(line: bytes) -> bytes:
    """What a line with carriage returns shows in the end; nothing if that is blank."""
    state = line.rstrip(b"\r").rpartition(b"\r")[2]
    return state if state.strip() else b""
