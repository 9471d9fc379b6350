"""A run on two nodes that is slow enough to be struck, and what must come out of it all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness.io.atomic import sha256_file
from harness.training.metrics_file import read_metrics
from tests.cluster.cluster import wait_until
from tests.runs import harness, steps_of, tiny_run, write_run

NUM_STEPS = 40
SAVE_EVERY = 10
SLOW_STEPS = Path(__file__).with_name("slow_steps")


class End(NamedTuple):
    """What a run has come to: sha256 of the exported weights; row digest and loss of every step."""

    weights: str
    rows: list[str]
    losses: list[float]


def slow_run(directory: Path, model: Path, *, seconds_per_step: float = 0.5, **changes: Any) -> dict[str, Any]:
    """NUM_STEPS steps with dropout, one rank on each machine, written to `directory`/run.yaml; see `tiny_run`."""
    step_log = directory / "steps-made"
    environment = {
        "PYTHONPATH": str(SLOW_STEPS), "TEST_STEP_S": str(seconds_per_step), "TEST_STEP_LOG": str(step_log),
    }  # fmt: skip
    run = tiny_run(
        directory, model, name="run",
        model__dropout=0.1, schedule__steps=NUM_STEPS, deepspeed__preset="zero2",
        checkpoint={"every_steps": SAVE_EVERY, "keep_last": 2},
        launch__processes=1, launch__environment=environment,
        **changes,
    )  # fmt: skip
    step_log.touch()
    write_run(run)
    return run


def end_undisturbed(run: dict[str, Any]) -> End:
    """The end of this run when it is made at once on this machine alone, with two ranks."""
    overrides = ("launch.backend=local", "launch.processes=2", "launch.environment={}")
    finished = harness("train", f"{run['output_dir']}/run.yaml", *overrides)
    assert finished.returncode == 0, finished.stderr
    return end_of(run)


def end_of(run: dict[str, Any]) -> End:
    steps = steps_of(run)
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    weights = sha256_file(run_dir(run) / "export/model.safetensors")
    return End(weights, [step["row_digest"] for step in steps], [step["loss"] for step in steps])


def num_lost_steps(run: dict[str, Any]) -> int:
    """Steps that a finished run has made more than once."""
    return len(Path(run["output_dir"], "steps-made").read_text().splitlines()) - NUM_STEPS


def wait_for_step(
    run: dict[str, Any], step: int, last_words: Callable[[], str | None], timeout_s: float = 120.0
) -> None:
    """Until the run has recorded `step`; AssertionError as soon as `last_words` says how it ended before."""

    def is_there() -> bool:
        assert (words := last_words()) is None, f"the run ended before step {step}: {words}"
        records = read_metrics(run_dir(run) / "metrics.jsonl")
        return any(record["event"] == "step" and record["step"] >= step for record in records)

    assert wait_until(is_there, timeout_s), f"no step {step} after {timeout_s} s"


def run_dir(run: dict[str, Any]) -> Path:
    return Path(run["output_dir"], run["name"])
