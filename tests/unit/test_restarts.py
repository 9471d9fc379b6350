"""How often a run is started again, and what launches.jsonl keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.errors import ExitCode
from harness.launch.failures import Outcome
from harness.launch.restarts import LAUNCHES_FILE, read_launches, run_attempts

CRASH = Outcome(ExitCode.OTHER, "rank 1 was killed", advice="run the same command again", is_restartable=True)
STOPPED = Outcome(ExitCode.INTERRUPTED, "stopped on request, saved")


class Attempts:
    """Starts of a run that end one after the other as `ends` say: an outcome, perhaps after a new checkpoint."""

    def __init__(self, run_dir: Path, *ends: Outcome | tuple[int, Outcome]) -> None:
        self.run_dir, self.ends, self.count = run_dir, ends, 0

    def __call__(self) -> Outcome:
        end = self.ends[self.count]
        self.count += 1
        if isinstance(end, Outcome):
            return end
        step, outcome = end
        checkpoint = self.run_dir / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()
        return outcome


def job(requeues: int, job_id: str = "77") -> dict[str, Any]:
    return {"backend": "slurm", "job_id": job_id, "requeues": requeues}


def started(run_dir: Path, origin: dict[str, Any], *ends: Outcome | tuple[int, Outcome], max_restarts: int = 2) -> int:
    """How many attempts one command makes."""
    attempts = Attempts(run_dir, *ends)
    run_attempts(attempts, run_dir, max_restarts=max_restarts, origin=origin)
    return attempts.count


@pytest.mark.parametrize("max_restarts", [0, 1, 3])
def test_as_many_restarts_as_allowed(tmp_path: Path, max_restarts: int) -> None:
    assert started(tmp_path, {"backend": "local"}, *[CRASH] * 9, max_restarts=max_restarts) == 1 + max_restarts


def test_the_budget_refills_when_the_newest_checkpoint_advances(tmp_path: Path) -> None:
    ends = (CRASH, CRASH, (5, CRASH), CRASH, CRASH, CRASH)
    attempts = Attempts(tmp_path, *ends)
    outcome = run_attempts(attempts, tmp_path, max_restarts=2, origin={"backend": "local"})
    assert attempts.count == 5
    assert "2 restarts in a row (launch.max_restarts) have come to no newer checkpoint" in outcome.message
    restarts = [record["restart"] for record in read_launches(tmp_path) if record["event"] == "start"]
    assert restarts == [0, 1, 2, 1, 2]


def test_a_new_command_of_a_user_has_a_fresh_budget(tmp_path: Path) -> None:
    for _ in range(2):
        assert started(tmp_path, {"backend": "local"}, *[CRASH] * 9) == 3
    for _ in range(2):  # in an interactive allocation
        assert started(tmp_path, job(0), *[CRASH] * 9) == 3


def test_requeues_without_progress_end(tmp_path: Path) -> None:
    assert [started(tmp_path, job(requeues), STOPPED) for requeues in range(4)] == [1, 1, 1, 0]
    outcome = run_attempts(Attempts(tmp_path), tmp_path, max_restarts=2, origin=job(4))
    assert outcome.exit_code == ExitCode.OTHER
    assert not outcome.is_restartable
    assert "(the last one: stopped on request, saved)" in outcome.message
    assert started(tmp_path, job(0, job_id="78"), STOPPED) == 1, "another job is a fresh start"


def test_crashes_of_an_earlier_start_of_the_job_count(tmp_path: Path) -> None:
    assert started(tmp_path, job(0), CRASH, STOPPED) == 2
    assert started(tmp_path, job(1), CRASH) == 1


def test_a_job_that_makes_progress_is_requeued_for_ever(tmp_path: Path) -> None:
    for requeues in range(6):
        assert started(tmp_path, job(requeues), (requeues + 1, STOPPED), max_restarts=0) == 1


def test_a_node_that_died_without_an_end_counts(tmp_path: Path) -> None:
    def power_cut() -> Outcome:
        raise SystemExit

    for requeues in range(3):
        with pytest.raises(SystemExit):
            run_attempts(power_cut, tmp_path, max_restarts=2, origin=job(requeues))
    assert started(tmp_path, job(3), STOPPED) == 0


def test_a_torn_line_is_passed_over_and_not_continued(tmp_path: Path) -> None:
    started(tmp_path, job(0), STOPPED)
    with (tmp_path / LAUNCHES_FILE).open("ab") as file:
        file.write(b'{"event": "end", "ti\xff')
    started(tmp_path, job(1), STOPPED)
    assert [record["event"] for record in read_launches(tmp_path)] == ["start", "end", "start", "end"]
    assert len((tmp_path / LAUNCHES_FILE).read_bytes().splitlines()) == 5
    (record,) = [one for one in read_launches(tmp_path) if one.get("requeues") == 1]
    assert record["restart"] == 1


def test_a_directory_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / LAUNCHES_FILE).mkdir()
    assert started(tmp_path, {"backend": "local"}, *[CRASH] * 9) == 3


def test_each_restart_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path, {"backend": "local"}, (4, CRASH), Outcome(ExitCode.DONE))
    expected = "error: rank 1 was killed\n  -> starting again from the checkpoint of step 4: restart 1 of 2\n"
    assert capsys.readouterr().err == expected
