"""Supervisors with small scripts as ranks; whatever a test does to them, nothing of them must be left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.supervised import Fleet, Run, wait_until


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`start(body, num_ranks=2, **launch)`: a failure ends it, unless `launch` has `max_restarts`."""
    yield from starter(tmp_path, Run, 2)


@pytest.fixture
def start_fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """The same with two ranks on each of two nodes."""
    yield from starter(tmp_path, Fleet, 4)


def starter(directory: Path, kind: type[Run], default_ranks: int) -> Iterator[Callable[..., Any]]:
    runs: list[Run] = []

    def start(body: str, *, num_ranks: int = default_ranks, **launch: Any) -> Run:
        runs.append(kind(directory, body, num_ranks=num_ranks, launch={"max_restarts": 0} | launch))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()
        wait_until(lambda run=run: not run.remaining())
        assert not list(run.private.iterdir()), "the private directory is left"
