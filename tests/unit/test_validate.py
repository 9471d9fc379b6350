"""Which step is the best so far: by the score alone, and by a paired bootstrap of written outputs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.config.schema import RunConfig
from harness.decoding.beam import BeamSettings
from harness.engine.processes import Processes
from harness.evaluation.decoded import Decoded
from harness.evaluation.result import Evaluation
from harness.scoring.scores import corpus_scores
from harness.tasks.task import Output
from harness.training.finish import write_summary
from harness.training.records import RunRecords
from harness.training.session import Progress, Session
from harness.training.validate import evaluation_directory, kept_best, should_stop_early, update_best
from tests.pairs import PAIRS

REFERENCES = [target for _, target in PAIRS]
PROCESSES = Processes(0, 0, 1, torch.device("cpu"), dist.HashStore())


def session(run_dir: Path, **sections: Any) -> Session:
    """What decides on the best step; it has no engine and no rows."""
    run: dict[str, Any] = {
        "name": "run",
        "model": {"path": "base"},
        "data": {"train": [{"path": "train.tsv"}]},
        "batch": {"tokens_per_step": 1000, "max_tokens_per_device": 500},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 40},
        "monitor": {"tensorboard": False},
        **sections,
    }
    config = RunConfig.model_validate(run)
    nothing: Any = None
    return Session(
        nothing, config, run_dir, PROCESSES, nothing, nothing, nothing, nothing, 40,
        RunRecords.open(run_dir, config, 0, resumed_step=None), nothing, nothing, Progress(), saved_step=-1,
    )  # fmt: skip


def evaluate_at(session: Session, step: int, num_wrong: int, references: list[str] = REFERENCES) -> Decoded:
    """The evaluation of a step with so many wrong rows, written as training does, and compared."""
    session.progress.step = step
    texts = ["falsch" if row < num_wrong else text for row, text in enumerate(references)]
    sources, pairs = [source for source, _ in PAIRS], [("en_XX", "de_DE")] * len(PAIRS)
    result = Decoded(
        {"loss": 1.0, "nll": 1.0}, len(texts), 1.0, sources, references, pairs,
        [[Output(text, -1.0)] for text in texts],
        corpus_scores(texts, references, ["chrf", "ter"], target_language="de_DE"), BeamSettings(5, 1.0, 100),
    )  # fmt: skip
    result.write(evaluation_directory(session.run_dir, step, "validation"))
    update_best(session, result)
    return result


def stopping(metric: str = "chrf", **options: Any) -> dict[str, Any]:
    return {"early_stopping": {"metric": metric, **options}, "evaluation": {"metrics": [metric]}}


@pytest.mark.parametrize("metric", ["chrf", "ter"])
def test_a_better_score_must_be_significantly_better(metric, tmp_path, capsys):
    run = session(tmp_path, **stopping(metric, significance=0.05, patience=3), checkpoint={"keep_best": 2})
    values = {}
    for step, num_wrong, best_step, without_gain in [
        (2, 30, 2, 0),
        (4, 29, 2, 1),  # higher, but one row of 42 may be chance
        (6, 28, 2, 2),
        (8, 12, 8, 0),
        (10, 20, 8, 1),
        (12, 11, 8, 2),
        (14, 12, 8, 3),
    ]:
        values[step] = evaluate_at(run, step, num_wrong).values[metric]
        assert (run.progress.best_step, run.progress.evaluations_without_gain) == (best_step, without_gain)
        assert run.progress.best_value == values[best_step]
        assert kept_best(run.progress.best, run.progress.best_step) == best_step
        assert should_stop_early(run) == (step == 14)
        run.progress = Progress(**json.loads(json.dumps(asdict(run.progress))))  # as after a restart
    assert run.progress.best == {"8": values[8], "12": values[12]}, "the best one, and the best of the others"
    assert "step 4: " in (out := capsys.readouterr().out)
    assert "is better than at step 2, not significantly (p " in out


def test_without_significance_any_better_score_is_better(tmp_path):
    run = session(tmp_path, **stopping())
    for step, num_wrong, best_step in [(2, 30, 2), (4, 29, 4), (6, 29, 4), (8, 31, 4), (10, 28, 10)]:
        evaluate_at(run, step, num_wrong)
        assert run.progress.best_step == best_step
        assert list(run.progress.best) == [str(best_step)]


def test_no_best_checkpoint_is_kept_but_the_best_step_is_known(tmp_path):
    run = session(tmp_path, **stopping(significance=0.05), checkpoint={"keep_best": 0})
    for step, num_wrong in [(2, 30), (4, 5), (6, 4)]:
        evaluate_at(run, step, num_wrong)
    assert (run.progress.best_step, run.progress.best) == (4, {})
    assert kept_best(run.progress.best, run.progress.best_step) is None


@pytest.mark.parametrize("lost", ["directory", "file", "rows"])
def test_outputs_that_are_lost_or_of_other_rows_leave_the_score_to_decide(lost, tmp_path, capsys):
    run = session(tmp_path, **stopping(significance=0.05))
    evaluate_at(run, 2, 30)
    directory = evaluation_directory(tmp_path, 2, "validation")
    if lost == "directory":
        shutil.rmtree(directory)
    if lost == "file":
        (directory / "hypotheses.txt").unlink()
    evaluate_at(run, 4, 29, REFERENCES[::-1] if lost == "rows" else REFERENCES)
    assert run.progress.best_step == 4
    assert "step 4: compared with step 2 by the score alone" in capsys.readouterr().out


def test_a_loss_is_watched_without_outputs(tmp_path):
    run = session(tmp_path, early_stopping={"metric": "nll"})
    for step, nll in [(2, 3.0), (4, 2.0), (6, 2.5)]:
        run.progress.step = step
        update_best(run, Evaluation({"loss": nll, "nll": nll}, 10, 1.0))
    assert (run.progress.best_step, run.progress.best) == (4, {"4": 2.0})


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    run = session(tmp_path, early_stopping={"metric": "nll"}, checkpoint={"keep_best": 2})
    for step, nll in [(2, math.nan), (4, 3.0), (6, math.nan), (8, 2.0), (10, -math.inf)]:
        run.progress.step = step
        update_best(run, Evaluation({"loss": nll, "nll": nll}, 10, 1.0))
    assert (run.progress.best_step, run.progress.best) == (8, {"8": 2.0, "4": 3.0})
    assert run.progress.evaluations_without_gain == 1
    write_summary(run, last_step=10, chosen=8, scores={"loss": math.inf, "nll": 2.0})
    assert json.loads((tmp_path / "summary.json").read_text())["test"] == {"loss": None, "nll": 2.0}
