"""The parts of backend `slurm` that need no Slurm: tests/cluster has the rest."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from harness.errors import ExitCode
from harness.launch.job_watch import saving_time
from harness.launch.slurm_tasks import step_failure
from tests.run_files import write_run_file


def test_train_outside_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    run_file = write_run_file(tmp_path, ("output_dir: runs", f"output_dir: {tmp_path}/runs"))
    assert main(["train", str(run_file), "launch.backend=slurm"]) == 2
    err = capsys.readouterr().err
    assert "this is not a job of Slurm" in err
    assert "harness submit" in err
    assert not (tmp_path / "runs").exists()


def test_time_to_leave_for_a_save(tmp_path: Path) -> None:
    assert saving_time(tmp_path) == 0.0
    saves = [
        {"event": "checkpoint", "step": step, "seconds": seconds} for step, seconds in enumerate([99, 2, 8, 4, 6, 2])
    ]
    lines = [json.dumps(record) for record in [*saves, {"event": "step", "step": 9, "seconds": 500}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "checkp']))
    assert saving_time(tmp_path) == 8 * 1.5 + 60  # of the last five


def record(run_dir: Path, rank: int, **values: Any) -> None:
    (run_dir / "errors").mkdir(exist_ok=True)
    content = {"time": 1.0, "exit_code": 1, "message": "broken", "step": 3, "kind": "ValueError", **values}
    (run_dir / "errors" / f"rank-{rank}.json").write_text(json.dumps(content))


def test_end_of_a_step_by_its_exit_code(tmp_path: Path) -> None:
    def ended(status: int, requested: signal.Signals | None = None) -> tuple[ExitCode, str, bool] | None:
        failure = step_failure(status, tmp_path, 2, requested)
        return failure and (failure.exit_code, failure.what, failure.is_restartable)

    assert ended(0) is None
    assert ended(75) is None
    assert ended(137) == (ExitCode.OTHER, "a rank was killed by SIGKILL: see what it printed", True)
    assert ended(1) == (ExitCode.OTHER, "srun ended with exit code 1: see what it printed", False)
    assert ended(-9) == (ExitCode.OTHER, "srun ended with exit code -9: see what it printed", True)
    assert ended(143, signal.SIGTERM) == (ExitCode.INTERRUPTED, "stopped by SIGTERM while starting", False)


def test_what_ranks_have_recorded_counts_unless_it_is_an_echo(tmp_path: Path) -> None:
    record(tmp_path, 0, kind="peer", message="Connection closed by peer")
    failure = step_failure(139, tmp_path, 2, None)
    assert failure is not None
    assert failure.what.startswith("a rank was killed by SIGSEGV")
    record(tmp_path, 1, exit_code=3, message="rows.tsv:7: no target")
    failure = step_failure(3, tmp_path, 2, None)
    assert failure is not None
    assert (failure.exit_code, failure.what) == (ExitCode.DATA, "rank 1 after step 3: rows.tsv:7: no target")
