"""Evaluations under ZeRO-3 on two ranks: with all weights gathered once, and in step, layer by layer.

All runs are made by one start of the ranks (tests/gathering_worker.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pairs import PAIRS
from tests.runs import SHARD_ALL, run_ranks, same_state, tiny_run, write_pairs
from tests.tiny import talkative

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER = Path(__file__).parent.parent / "gathering_worker.py"
NUM_STEPS, EVALUATE_EVERY = 4, 2
EVALUATION = {"every_steps": EVALUATE_EVERY, "beam_size": 3, "max_target_length": 16, "metrics": ["chrf"]}
ZERO3 = {"preset": "zero3", "overrides": SHARD_ALL}
OFFLOADED = {"preset": "zero3_offload", "overrides": SHARD_ALL}
RUNS: dict[str, dict[str, Any]] = {
    "zero0": {},
    "gathered": {"deepspeed": ZERO3},
    "lockstep": {"deepspeed": ZERO3},
    "fails": {"deepspeed": ZERO3},
    "unscored": {"deepspeed": ZERO3, "evaluation": None},
    "persistent": {"deepspeed": {"preset": "zero3"}},
    "persistent-unscored": {"deepspeed": {"preset": "zero3"}, "evaluation": None},
    "offloaded": {"deepspeed": OFFLOADED},
    "offloaded-unscored": {"deepspeed": OFFLOADED, "evaluation": None},
    "int8-zero0": {"evaluation": EVALUATION | {"precision": "int8"}},
    "int8": {"deepspeed": ZERO3, "evaluation": EVALUATION | {"precision": "int8"}},
    "bfloat16": {"deepspeed": ZERO3, "evaluation": EVALUATION | {"precision": "bfloat16"}},
    "int8-lockstep": {"deepspeed": ZERO3, "evaluation": EVALUATION | {"precision": "int8"}},
}


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by name."""
    directory = tmp_path_factory.mktemp("gathered")
    model = talkative(tiny_models["mbart"], directory / "model")
    held_out = str(write_pairs(directory / "held-out.tsv", PAIRS[:9]))
    shared = {
        "data__validation": held_out, "batch__max_tokens_per_device": 60, "schedule__steps": NUM_STEPS,
        "schedule__warmup_steps": 2, "evaluation": EVALUATION, "checkpoint": {"every_steps": NUM_STEPS},
    }  # fmt: skip
    made = [tiny_run(directory, model, name=name, **{**shared, **own}) for name, own in RUNS.items()]
    run_ranks(made, world_size=2, worker=WORKER, timeout_s=500)
    return {name: directory / name for name in RUNS}


def hypotheses(run_dir: Path, step: int) -> str:
    return (run_dir / "evaluations" / f"step-{step:08d}-validation" / "hypotheses.txt").read_text()


def checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}"


def seen(run_dir: Path) -> list[list[Any]]:
    """Of each evaluation: had every rank all weights, and how often DeepSpeed fetched those of a module."""
    return json.loads((run_dir / "has-all.json").read_text())


def test_gathered_in_step_and_whole_give_the_same_hypotheses(runs: dict[str, Path]) -> None:
    assert len(set(hypotheses(runs["zero0"], 0).splitlines())) > 4
    for name in ("gathered", "lockstep", "offloaded", "persistent"):
        assert hypotheses(runs[name], 0) == hypotheses(runs["zero0"], 0), name
    for step in range(0, NUM_STEPS + 1, EVALUATE_EVERY):
        assert hypotheses(runs["gathered"], step) == hypotheses(runs["lockstep"], step)


def test_weights_are_gathered_once_or_for_every_layer(runs: dict[str, Path]) -> None:
    for name in ("gathered", "offloaded", "persistent", "int8", "bfloat16"):
        assert seen(runs[name]) == [[True, 0]] * 3, name
    for has_all, num_fetched in seen(runs["lockstep"]):
        assert not has_all
        assert num_fetched > 500


@pytest.mark.parametrize(
    ("scored", "unscored"),
    [
        ("gathered", "unscored"), ("lockstep", "unscored"), ("fails", "unscored"), ("int8", "unscored"),
        ("bfloat16", "unscored"), ("offloaded", "offloaded-unscored"), ("persistent", "persistent-unscored"),
    ],
)  # fmt: skip
def test_training_goes_on_as_if_nothing_had_been_evaluated(runs: dict[str, Path], scored: str, unscored: str) -> None:
    assert same_state(checkpoint(runs[scored]), checkpoint(runs[unscored]))


def test_an_evaluation_that_fails_gives_the_shards_and_hooks_back(runs: dict[str, Path]) -> None:
    assert seen(runs["fails"])[1] == [True, 0]
    assert hypotheses(runs["fails"], NUM_STEPS) == hypotheses(runs["gathered"], NUM_STEPS)


def test_int8_works_on_gathered_weights_and_is_refused_without(runs: dict[str, Path]) -> None:
    assert hypotheses(runs["int8"], 0) == hypotheses(runs["int8-zero0"], 0)
    error = (runs["int8-lockstep"] / "error-1.txt").read_text()
    assert "evaluation.precision: int8 needs all weights on every rank" in error
