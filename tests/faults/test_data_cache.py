"""The data cache among processes: killed builders, and two builders of the same rows at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.schema import DataConfig
from harness.data.cache import cache_key, load_rows

pytestmark = pytest.mark.slow

BUILDER = """
import os, signal, sys, time
from pathlib import Path
from harness.config.schema import DataConfig
from harness.data import cache

cache.ROWS_PER_BATCH = 100
root, mode = Path(sys.argv[1]), sys.argv[2]
data = DataConfig.model_validate({"train": [{"path": str(root / "train.tsv")}]})
calls = 0

def encode(rows):
    global calls
    calls += 1
    if mode == "die" and calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05 if mode == "slow" else 0)
    return [(row, cache.Encoded(list(row.source.encode()), list(row.target.encode()))) for row in rows]

prepared = cache.prepare_rows("train", data.train, data, encode=encode, fingerprint="bytes",
                              cache_root=root / "cache", is_training=True)
print(calls, prepared.rows.digest)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = "".join(f"row {i}\tZeile {i}\n" for i in range(1000))
    (tmp_path / "train.tsv").write_text("source\ttarget\n" + rows)
    return tmp_path


def start(root: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(root), mode], stdout=subprocess.PIPE, text=True)


def directory_of(root: Path) -> Path:
    data = DataConfig.model_validate({"train": [{"path": str(root / "train.tsv")}]})
    return root / "cache" / cache_key(data.train, data, "bytes", is_training=True)


def test_killed_builder_leaves_nothing_readable_and_the_next_one_finishes(root: Path) -> None:
    with start(root, "die") as builder:
        assert builder.wait(timeout=120) == -9
    assert not directory_of(root).exists()
    assert directory_of(root).with_suffix(".building").exists()
    output, _ = start(root, "fast").communicate(timeout=120)
    assert output.split()[0] == "10"
    assert len(load_rows(directory_of(root))) == 1000
    assert not directory_of(root).with_suffix(".building").exists()


def test_of_two_builders_one_encodes_and_the_other_waits_for_it(root: Path) -> None:
    builders = [start(root, "slow"), start(root, "slow")]
    outputs = [builder.communicate(timeout=120)[0].split() for builder in builders]
    assert sorted(calls for calls, _ in outputs) == ["0", "10"]
    assert len({digest for _, digest in outputs}) == 1
