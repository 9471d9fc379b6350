"""A run of two ranks keeps the last step that was significantly better, as sacreBLEU's test finds it in the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest

from harness.io.atomic import read_json
from tests.pairs import PAIRS
from tests.runs import run_ranks, tiny_run, write_pairs

LIMIT = 0.05


@pytest.mark.slow
def test_the_best_step_is_the_last_that_was_significantly_better(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        tiny_models["mbart"],
        name="run",
        data__validation=str(write_pairs(tmp_path / "validation.tsv", PAIRS)),
        batch={"tokens_per_step": 1200, "max_tokens_per_device": 1200},
        optimizer={"lr": 5e-3},
        schedule__steps=120,
        evaluation={"every_steps": 6, "beam_size": 1, "max_target_length": 20, "metrics": ["chrf"]},
        early_stopping={"metric": "chrf", "significance": LIMIT, "patience": 20},
    )
    run_ranks([run], 2)

    directories = sorted((tmp_path / "run" / "evaluations").glob("step-*-validation"))[1:]  # not that of step 0
    best, decisions = directories[0], []
    for directory in directories[1:]:
        is_higher = read_json(directory / "scores.json")["chrf"] > read_json(best / "scores.json")["chrf"]
        is_better = is_higher and p_of(best, directory) < LIMIT
        decisions.append((is_higher, is_better))
        best = directory if is_better else best
    assert {(True, True), (True, False)} <= set(decisions), "both come up in this run"
    assert read_json(tmp_path / "run" / "summary.json")["exported_step"] == int(best.name.split("-")[1])


def p_of(baseline: Path, system: Path) -> float:
    named = [(one.name, (one / "hypotheses.txt").read_text().splitlines()) for one in (baseline, system)]
    references = (system / "references.txt").read_text().splitlines()
    _, results = PairedTest(named, {"chrf": CHRF()}, [references], "bs", n_samples=1000)()
    p = results["chrF2"][1].p_value
    assert isinstance(p, float)
    return p
