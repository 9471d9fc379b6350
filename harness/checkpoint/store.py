"""Checkpoint directories: nothing exists until it is committed.

checkpoints/step-00000500/   manifest.json: every file's size and sha256, the run's state, and its own sha256
checkpoints/latest           the name of the newest committed step, for people; manifests are the truth
checkpoints/.*.tmp           a save or a removal in progress; leftovers are removed at the next start
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.io.atomic import fsync_directory, read_json, sha256_file, write_json, write_text
from harness.io.faults import fault_point

FORMAT_VERSION = 4
MANIFEST, LATEST = "manifest.json", "latest"
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_ALL = slice(None)

FileRecord = dict[str, Any]  # {"name", "bytes", "sha256"}


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; `state` is what the loop needs besides tensors."""

    directory: Path
    step: int
    state: dict[str, Any]
    files: list[FileRecord]

    @property
    def num_bytes(self) -> int:
        return sum(file["bytes"] for file in self.files)


class CheckpointStore:
    """The `checkpoints/` directory of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def temporary(self, step: int) -> Path:
        return self.root / f".step-{step:08d}.tmp"

    def begin(self, step: int) -> Path:
        """An empty temporary directory for the files of `step`; one process calls this before any rank writes."""
        directory = self.temporary(step)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        return directory

    def discard(self, step: int) -> None:
        """Give up the save of `step`; what had been written of it goes."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def commit(self, step: int, files: Iterable[FileRecord], state: dict[str, Any]) -> Checkpoint:
        """Make `step` exist: manifest last, then rename, then the pointer. One process calls this."""
        temporary, directory = self.temporary(step), self._directory(step)
        files = sorted(files, key=lambda file: file["name"])
        fault_point("checkpoint.before_manifest")
        _write_manifest(temporary, step, state, files)
        fault_point("checkpoint.before_rename")
        if directory.exists():  # broken: the run came back from an older one and is here again
            self._remove(step)
        os.rename(temporary, directory)
        fsync_directory(self.root)
        fault_point("checkpoint.before_pointer")
        write_text(self.root / LATEST, directory.name + "\n")
        return Checkpoint(directory, step, state, files)

    def amend(self, step: int, state: dict[str, Any]) -> None:
        """Replace entries of the state of a committed checkpoint, atomically; its tensors stay."""
        old = _read_manifest(self._directory(step), step)
        _write_manifest(old.directory, step, old.state | state, old.files)

    def steps(self) -> list[int]:
        """Steps of all committed directories, oldest first, whole or not."""
        if not self.root.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def open(self, step: int, part: slice = _ALL) -> Checkpoint:
        """Read the manifest of `step` and compare the files (or a part of them) with it.

        Raises DataError naming file and bytes.
        """
        checkpoint = _read_manifest(self._directory(step), step)
        for file in checkpoint.files[part]:
            verify_file(checkpoint.directory, file)
        return checkpoint

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """`newest_of` all steps, verified by this process."""
        return self.newest_of(self.steps(), self.open)

    def newest_of(
        self, steps: Iterable[int], open_step: Callable[[int], Checkpoint]
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that opens, and why newer ones were passed over.

        None when the run has no checkpoint yet. Raises DataError when there are checkpoints and every one is broken:
        a run never starts silently from step 0, and nothing is deleted.
        """
        broken: list[str] = []
        for step in sorted(steps, reverse=True):
            try:
                return open_step(step), broken
            except DataError as error:
                broken.append(str(error))
        if broken:
            raise DataError(
                "no checkpoint of this run can be used:\n  " + "\n  ".join(broken),
                where=str(self.root),
                hint="restore one of them, or move the directory away to start from step 0",
            )
        return None, []

    def remove_leftovers(self) -> None:
        """Remove what saves and removals left that a crash cut short."""
        for path in [*self.root.glob(".*.tmp"), *self.root.glob("step-*/.*.tmp")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def retain(self, step: int, *, num_last: int, best: Iterable[int]) -> None:
        """After a save of `step`: delete what is older but for the `num_last` newest, `step` included, and the `best`.

        Newer ones stay: those are broken (else the run would not be at `step`) and are replaced when it reaches them.
        """
        reached = [one for one in self.steps() if one <= step]
        for one in set(reached[:-num_last]).difference(best):
            self._remove(one)

    def _remove(self, step: int) -> None:
        doomed = self.root / f".step-{step:08d}.removed.tmp"
        os.rename(self._directory(step), doomed)  # a half-deleted directory must not look like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)  # NFS keeps files that a rank has open; the next start tries again

    def _directory(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"


def record_file(path: Path) -> FileRecord:
    """Make a written file durable and describe it for the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def verify_file(directory: Path, record: FileRecord) -> None:
    """Raise DataError unless the file is byte for byte what the manifest says."""
    path = directory / record["name"]
    try:
        if not path.is_file():
            raise DataError("the file is missing", where=str(path))
        if (size := path.stat().st_size) != record["bytes"]:
            raise DataError(f"the file has {size} bytes, its manifest says {record['bytes']}", where=str(path))
        if sha256_file(path) != record["sha256"]:
            raise DataError("the file's sha256 differs from its manifest: its content has changed", where=str(path))
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from error


def _write_manifest(directory: Path, step: int, state: dict[str, Any], files: list[FileRecord]) -> None:
    content = {"format": FORMAT_VERSION, "step": step, "state": state, "files": files}
    write_json(directory / MANIFEST, content | {"sha256": _digest(content)})


def _read_manifest(directory: Path, step: int) -> Checkpoint:
    """A manifest that says what was written. Raises DataError."""
    path = directory / MANIFEST
    content = read_json(path)
    try:
        if content["format"] != FORMAT_VERSION:
            raise DataError(f"its format is {content['format']!r}, not {FORMAT_VERSION}", where=str(path))
        if content.pop("sha256") != _digest(content):
            raise DataError("the manifest's sha256 differs from what it says: it has been changed", where=str(path))
        if content["step"] != step:
            raise DataError(f"it is the manifest of step {content['step']}", where=str(path))
        for file in content["files"]:
            if Path(file["name"]).name != file["name"]:
                raise DataError(f"{file['name']!r} is not a plain file name", where=str(path))
        return Checkpoint(directory, step, content["state"], content["files"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a checkpoint manifest ({error})", where=str(path)) from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
