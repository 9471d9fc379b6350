"""Checkpoint directories: nothing exists until it is committed.

    checkpoints/step-00000500/   manifest.json: every file's size and sha256, and the run's state
    checkpoints/latest           the name of the newest committed step, for people; manifests are the truth
    checkpoints/.step-*.tmp      a save in progress; leftovers are removed at the next start
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.io.atomic import fsync_directory, read_json, sha256_file, write_json, write_text
from harness.io.faults import fault_point

FORMAT_VERSION = 1
MANIFEST, LATEST = "manifest.json", "latest"
_STEP = re.compile(r"step-(\d{8,})")

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

    def commit(self, step: int, files: Iterable[FileRecord], state: dict[str, Any]) -> Checkpoint:
        """Make `step` exist: manifest last, then rename, then the pointer. One process calls this."""
        temporary, directory = self.temporary(step), self._directory(step)
        files = sorted(files, key=lambda file: file["name"])
        manifest = {"format": FORMAT_VERSION, "step": step, "state": state, "files": files}
        fault_point("checkpoint.before_manifest")
        write_json(temporary / MANIFEST, manifest)
        fault_point("checkpoint.before_rename")
        if directory.exists():  # saved again after a resume from an older step
            shutil.rmtree(directory)
        os.rename(temporary, directory)
        fsync_directory(self.root)
        fault_point("checkpoint.before_pointer")
        write_text(self.root / LATEST, directory.name + "\n")
        return Checkpoint(directory, step, state, files)

    def steps(self) -> list[int]:
        """Steps of all committed directories, oldest first, whole or not."""
        if not self.root.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def open(self, step: int, *, verify: bool = True) -> Checkpoint:
        """Read the manifest of `step`, and compare every file with it. Raises DataError naming file and bytes."""
        directory = self._directory(step)
        manifest = read_json(directory / MANIFEST)
        try:
            if manifest["format"] != FORMAT_VERSION:
                raise DataError(f"format {manifest['format']} is not {FORMAT_VERSION}", where=str(directory / MANIFEST))
            checkpoint = Checkpoint(directory, manifest["step"], manifest["state"], manifest["files"])
            if verify:
                for file in checkpoint.files:
                    verify_file(directory, file)
        except (KeyError, TypeError) as error:
            raise DataError(f"not a checkpoint manifest ({error})", where=str(directory / MANIFEST)) from error
        return checkpoint

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and why newer ones were passed over.

        None when the run has no checkpoint yet. Raises DataError when there are checkpoints and every one is broken:
        a run never starts silently from step 0, and nothing is deleted.
        """
        broken: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.open(step), broken
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
        """Remove temporary directories of saves that a crash cut short."""
        for path in self.root.glob(".step-*.tmp"):
            shutil.rmtree(path)

    def retain(self, keep: set[int]) -> None:
        """Delete all checkpoints but those of `keep`, oldest first."""
        for step in self.steps():
            if step not in keep:
                doomed = self.root / f".step-{step:08d}.removed.tmp"
                os.rename(self._directory(step), doomed)  # a half-deleted directory must not look like a checkpoint
                shutil.rmtree(doomed)

    def _directory(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"


def record_file(path: Path) -> FileRecord:
    """Make a written file durable and describe it for the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def verify_file(directory: Path, record: FileRecord) -> None:
    """Raise DataError unless the file is byte for byte what the manifest says."""
    name = record["name"]
    if Path(name).name != name:
        raise DataError(f"{name!r} is not a plain file name", where=str(directory / MANIFEST))
    path = directory / name
    if not path.is_file():
        raise DataError("the file is missing", where=str(path))
    if (size := path.stat().st_size) != record["bytes"]:
        raise DataError(f"the file has {size} bytes, its manifest says {record['bytes']}", where=str(path))
    if sha256_file(path) != record["sha256"]:
        raise DataError("the file's sha256 differs from its manifest: its content has changed", where=str(path))
