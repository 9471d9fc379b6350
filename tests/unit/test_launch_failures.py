"""Which rank is blamed, and what a run directory tells about its progress."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from harness.errors import ExitCode
from harness.launch.failures import (
    PEER_LOST,
    RankEnd,
    advice,
    describe_end,
    first_failure,
    last_step,
    newest_checkpoint,
)


def write_record(run_dir: Path, rank: int, **fields: object) -> None:
    path = run_dir / "errors" / f"rank-{rank}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rank": rank, "message": f"message {rank}", "exit_code": 1, "kind": "crash"} | fields))


def test_good_ends_are_no_failure(tmp_path: Path) -> None:
    write_record(tmp_path, 1, exit_code=75, message="interrupted", time=5.0)
    ends = [RankEnd(0, 0, 10.0), RankEnd(1, 75, 11.0), RankEnd(2, -9, 12.0, is_killed_by_us=True)]
    assert first_failure(ends, tmp_path, requested=None) is None


def test_earliest_record_wins_though_its_rank_ended_last(tmp_path: Path) -> None:
    write_record(tmp_path, 0, time=8.0)
    write_record(tmp_path, 1, time=7.0, exit_code=5, step=3)
    ends = [RankEnd(0, 1, 9.0), RankEnd(1, 5, 10.0)]
    failure = first_failure(ends, tmp_path, requested=None)
    assert failure is not None
    assert (failure.exit_code, failure.what) == (ExitCode.NON_FINITE, "rank 1 after step 3: message 1")


def test_lost_peer_is_never_the_cause(tmp_path: Path) -> None:
    write_record(tmp_path, 0, time=1.0, kind=PEER_LOST)
    failure = first_failure([RankEnd(0, 1, 2.0), RankEnd(1, 3, 60.0)], tmp_path, requested=None)
    assert failure is not None
    assert failure.what.startswith("rank 1 ended with exit code 3")


def test_record_counts_though_we_killed_its_rank(tmp_path: Path) -> None:
    write_record(tmp_path, 0, time=1.0, exit_code=4)
    failure = first_failure([RankEnd(0, -9, 2.0, is_killed_by_us=True)], tmp_path, requested=None)
    assert failure is not None
    assert failure.exit_code is ExitCode.RESOURCES


@pytest.mark.parametrize(("status", "blamed"), [(-signal.SIGKILL, 1), (-signal.SIGSEGV, 1), (-signal.SIGABRT, 0)])
def test_sudden_death_comes_before_its_echo(tmp_path: Path, status: int, blamed: int) -> None:
    """The peers' error is written within a second of the death that causes it; an abort is mostly an echo itself."""
    write_record(tmp_path, 0, time=9.5)
    failure = first_failure([RankEnd(0, 1, 10.0), RankEnd(1, status, 10.0)], tmp_path, requested=None)
    assert failure is not None
    assert failure.what.startswith(f"rank {blamed}")


def test_death_by_the_requested_signal_is_an_interruption(tmp_path: Path) -> None:
    ends = [RankEnd(0, -signal.SIGTERM, 1.0)]
    failure = first_failure(ends, tmp_path, requested=signal.SIGTERM)
    assert failure is not None
    assert failure.exit_code is ExitCode.INTERRUPTED
    failure = first_failure(ends, tmp_path, requested=None)
    assert failure is not None
    assert failure.exit_code is ExitCode.OTHER


def test_crash_without_a_record_shows_the_last_lines(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-2.log").write_text("\n".join(f"line {index}" for index in range(100)))
    failure = first_failure([RankEnd(2, 1, 1.0)], tmp_path, requested=None)
    assert failure is not None
    assert failure.details.splitlines()[1:] == [f"line {index}" for index in range(85, 100)]


def test_unknown_signal_has_a_number() -> None:
    assert describe_end(RankEnd(3, -250, 0.0)) == "rank 3 was killed by signal 250"


def test_last_step(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    lines = ['{"event": "step", "step": 4}', '{"event": "checkpoint", "step": 5}', '["step"]', '{"event": "step", "st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert last_step(tmp_path) == 4


def test_newest_checkpoint_has_a_manifest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000090", "step-00000100", "step-00000200.tmp", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-00000300").mkdir()
    assert newest_checkpoint(tmp_path) == 100


def test_advice_depends_on_whose_error_it_is(tmp_path: Path) -> None:
    assert advice(tmp_path, ExitCode.OTHER) == "run the same command again: it starts from the beginning"
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000007" / "manifest.json").touch()
    expected = "mend this, then run the same command again: it resumes from the checkpoint of step 7"
    assert advice(tmp_path, ExitCode.DATA) == expected
