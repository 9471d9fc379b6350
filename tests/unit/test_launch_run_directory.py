"""What stands in a run directory before the first rank starts, and that it has one owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from harness.cluster.backends import plan_run
from harness.config.load import load_run_config
from harness.errors import ConfigError, ResourceError
from harness.launch import run_directory
from harness.launch.run_directory import opened_run_directory, owner
from harness.plan.plan import Plan

RUN_FILE = """
name: norsk
output_dir: {output_dir}
model: {{path: no-such-model}}
data: {{train: [{{path: rows.tsv}}], source_language: no, target_language: "1e-4"}}
batch: {{tokens_per_step: 4096, max_tokens_per_device: 1024}}
optimizer: {{lr: 1e-4}}
schedule: {{steps: 10}}
launch: {{processes: 3}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE.format(output_dir=tmp_path / "runs"))
    return path


def test_world_size_is_the_launcher_s_else_the_run_file_s(run_file: Path) -> None:
    assert plan_run(run_file, []).world_size == 3
    assert plan_run(run_file, [], world_size=8).world_size == 8
    assert plan_run(run_file, ["launch.processes=auto"]).world_size == 1


def test_files_of_a_start(run_file: Path, tmp_path: Path) -> None:
    plan = plan_run(run_file, ["seed=5"])
    with opened_run_directory(plan) as run_dir:
        assert run_dir == tmp_path / "runs" / "norsk"
    assert load_run_config(run_dir / "config.yaml") == plan.config
    assert plan.config.data.source_language == "no"
    assert plan.config.seed == 5
    assert Plan.from_json(json.loads((run_dir / "plan.json").read_text())) == plan
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert environment["command"] == sys.argv


def test_a_run_directory_has_one_owner_until_it_ends(run_file: Path) -> None:
    plan = plan_run(run_file, [])
    with opened_run_directory(plan) as run_dir:
        before = (run_dir / "environment.json").stat().st_mtime_ns
        assert (owner(run_dir) or "").startswith(f"pid {os.getpid()} on ")
        code = (
            "import sys; from harness.cluster.backends import *; from harness.launch.run_directory import *\n"
            f"plan = plan_run(Path({str(run_file)!r}), [])\n"
            "with opened_run_directory(plan): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"ConfigError: {run_dir}: pid {os.getpid()} on " in other.stderr
        assert (run_dir / "environment.json").stat().st_mtime_ns == before
    assert owner(run_dir) is None
    with opened_run_directory(plan):
        pass


def test_a_killed_owner_is_no_owner(run_file: Path) -> None:
    code = (
        "import os; from harness.cluster.backends import *; from harness.launch.run_directory import *\n"
        f"with opened_run_directory(plan_run(Path({str(run_file)!r}), [])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    plan = plan_run(run_file, [])
    assert owner(Path(plan.run_dir)) is None
    with opened_run_directory(plan):
        pass


def test_a_directory_that_cannot_be_made(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(ConfigError, match="cannot write the run directory: Not a directory"),
        opened_run_directory(plan_run(run_file, [])),
    ):
        pass


def test_a_full_disk(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_json(path: Path, obj: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "write_json", write_json)
    with pytest.raises(ResourceError, match="No space left"), opened_run_directory(plan_run(run_file, [])):
        pass


def test_no_run_directory_has_no_owner(tmp_path: Path) -> None:
    assert owner(tmp_path / "nothing") is None


def test_starting_needs_no_torch() -> None:
    code = "import sys, harness.cli.train, harness.launch.run_directory, harness.launch.supervisor as _; "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
