"""Which keys may change when a run goes on, and when a run is over."""

from __future__ import annotations

from typing import Any

import pytest

from harness.cluster.backends import plan_run
from harness.config.changes import forbidden_changes
from harness.config.load import load_run_config
from harness.io.atomic import write_json
from harness.launch.run_directory import completed
from tests.run_files import write_run_file


@pytest.fixture
def compare(tmp_path):
    path = write_run_file(tmp_path)
    before = load_run_config(path).model_dump(mode="json")

    def keys(*overrides: str) -> dict[str, tuple[Any, Any]]:
        changes = forbidden_changes(before, load_run_config(path, overrides))
        return {change.key: (change.old, change.new) for change in changes}

    return keys


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        ("seed=3", 17, 3),
        ("optimizer.lr=1e-4", 3e-5, 1e-4),
        ("optimizer.betas=[0.9, 0.999]", [0.9, 0.98], [0.9, 0.999]),
        ("schedule.steps=200", 100, 200),
        ("batch.tokens_per_step=8192", 4096, 8192),
        ("loss.label_smoothing=0.1", 0.0, 0.1),
        ("model.dtype=float32", "bfloat16", "float32"),
        ("model.dropout=0.1", None, 0.1),
        ("data.cleaning.drop_copies=false", True, False),
    ],
)
def test_keys_that_decide_what_is_learnt_are_told_with_both_values(compare, override, old, new):
    assert compare(override) == {override.partition("=")[0]: (old, new)}


def test_another_training_file_is_told_entry_by_entry(compare):
    changes = compare("data.train=[{path: train.tsv}, {path: more.tsv}]")
    assert changes["data.train.1.path"] == (None, "more.tsv")
    assert set(changes) == {"data.train.1.path", "data.train.1.weight"}


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "batch.max_tokens_per_device=512",
        "model.gradient_checkpointing=true",
        "deepspeed.preset=zero3",
        "evaluation.beam_size=2",
        "evaluation=null",
        "checkpoint.every_steps=5",
        "monitor.tensorboard=false",
        "launch.processes=2",
    ],
)
def test_keys_that_only_decide_how_may_change(compare, override):
    assert compare(override) == {}


def test_the_score_that_chooses_the_best_checkpoint_may_not_change(compare):
    assert compare("evaluation.metrics=[bleu, ter]") == {}
    assert compare("evaluation.metrics=[ter, bleu]") == {"evaluation.metrics.0": ("bleu", "ter")}
    assert compare("early_stopping={metric: loss}") == {"early_stopping.metric": ("bleu", "loss")}


def test_a_run_file_of_another_version_is_compared_as_it_stands(tmp_path):
    config = load_run_config(write_run_file(tmp_path))
    old = config.model_dump(mode="json") | {"moon_phase": "full"}
    assert [tuple(change) for change in forbidden_changes(old, config)] == [("moon_phase", "full", None)]


class TestCompleted:
    """`summary.json` of 60 of 100 steps, ended by early stopping, or of all."""

    @pytest.fixture
    def ask(self, tmp_path):
        path = write_run_file(tmp_path)
        always = [f"output_dir={tmp_path}", "early_stopping={metric: bleu, patience: 3}"]

        def ask(steps: int, *overrides: str) -> str | None:
            plan = plan_run(path, always, world_size=1)
            stopping = {"metric": "bleu", "patience": 3, "significance": None}
            scores = {"bleu": 12.5, "loss": None}
            summary = {"steps": steps, "total_steps": 100, "early_stopping": stopping, "test": scores}
            write_json(tmp_path / "enro" / "plan.json", plan.to_json())
            write_json(tmp_path / "enro" / "summary.json", summary)
            return completed(plan_run(path, [*always, *overrides], world_size=1))

        return ask

    def test_a_run_of_all_its_steps_is_over_whatever_stops_early(self, ask):
        assert "100 steps, test bleu 12.5, test loss not finite" in (ask(100) or "")
        assert ask(100, "early_stopping=null", "evaluation.beam_size=1", "launch.processes=1")

    def test_a_run_that_early_stopping_ended_goes_on_when_that_section_changes(self, ask):
        assert "60 steps" in (ask(60) or "")
        assert ask(60, "early_stopping.patience=5") is None
        assert ask(60, "early_stopping=null") is None

    def test_another_run_file_is_not_over(self, ask):
        assert ask(100, "optimizer.lr=1e-4") is None

    def test_a_run_without_summary_is_not_over(self, tmp_path):
        assert completed(plan_run(write_run_file(tmp_path), [f"output_dir={tmp_path}"], world_size=1)) is None
