"""The heartbeat file, and what the supervisor makes of it."""

from __future__ import annotations

from pathlib import Path

from harness.config.launch_schema import LaunchConfig, PhaseTimeouts
from harness.io import heartbeat
from harness.launch.watch import Watch


def test_phases_are_those_that_have_a_time_out() -> None:
    assert list(heartbeat.PHASES) == list(PhaseTimeouts.model_fields)


def test_a_rank_that_has_not_begun(tmp_path: Path) -> None:
    cells = heartbeat.create(tmp_path / "rank-0")
    (tmp_path / "rank-0").unlink()  # as programs do that tidy up /tmp
    pulse = heartbeat.read(cells)
    assert (pulse.alive_age_s, pulse.phase, pulse.step) == (None, "meet", None)
    assert 0.0 <= pulse.phase_age_s < 60.0


def test_beats_without_a_supervisor_are_kept_for_error_records() -> None:
    before = heartbeat.last_step()
    heartbeat.beat("step", 7)
    assert heartbeat.last_step() == 7
    heartbeat.beat("evaluation")
    assert heartbeat.last_step() == 7
    heartbeat.beat("load", before or 0)


def test_a_rank_that_has_just_been_started_is_not_late(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LaunchConfig())
    variables = watch.begin(3)
    assert Path(variables[heartbeat.VARIABLE]).parent == tmp_path
    watch.look([3])
    assert watch.late() is None
    assert not watch.answers(3)
    assert watch.stack(3) == ""
    assert watch.shown()["3"]["phase"] == "meet"


def test_a_phase_without_a_limit_may_last(tmp_path: Path) -> None:
    watch = Watch(tmp_path, LaunchConfig(timeouts_s=PhaseTimeouts(meet=None)))
    watch.begin(0)
    watch.look([0])
    assert watch.late() is None
