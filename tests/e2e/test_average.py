"""`harness average` against plain means of the steps that `harness export` writes; and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from harness.cli.main import main
from tests.llm_runs import llm_run
from tests.pairs import PAIRS
from tests.runs import harness, run_ranks, tiny_run, write_pairs, write_run
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow
SAVING = {"every_steps": 2, "keep_last": 4, "keep_best": 2}


class Runs(NamedTuple):
    translation: Path
    adapter: Path
    rows: Path


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of 8 steps with checkpoints of 2, 4, 6, 8: a bfloat16 mBART under ZeRO-2, and LoRA on a language model."""
    directory = tmp_path_factory.mktemp("average")
    rows = write_pairs(directory / "rows.tsv", PAIRS[:6])
    common: dict[str, Any] = {"schedule__steps": 8, "checkpoint": SAVING}
    translation = tiny_run(
        directory, tiny_models["mbart"], name="translation", **common, model__dtype="bfloat16",
        deepspeed__preset="zero2", data__validation=str(rows), evaluation={"every_steps": 2, "metrics": []},
    )  # fmt: skip
    model = make_tiny_llm(directory / "model")
    adapter = llm_run(directory, model, name="adapter", **common, adapter={"rank": 4})
    run_ranks([translation, adapter], world_size=2)
    return Runs(directory / "translation", directory / "adapter", rows)


def command(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def mean_of_exports(run: Path, steps: list[int], directory: Path, file: str) -> dict[str, Tensor]:
    exported = []
    for step in steps:
        out = directory / f"{run.name}-{step}"
        assert command("export", run, out, "--step", step, "--dtype", "float32") == 0
        exported.append(load_file(out / file))
    return {name: torch.stack([one[name].double() for one in exported]).mean(dim=0) for name in exported[0]}


@pytest.mark.parametrize(
    ("options", "steps"), [(["--last", 3], [4, 6, 8]), (["--steps", "8,2"], [2, 8]), ([], [2, 4, 6, 8])]
)
def test_the_average_is_the_mean_of_the_exported_steps(
    runs: Runs, options: list[Any], steps: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "average"
    assert command("average", runs.translation, out, *options, "--dtype", "float32") == 0
    assert f"mean of steps {', '.join(map(str, steps))} of {runs.translation} as float32" in capsys.readouterr().out
    assert json.loads((out / "average.json").read_text()) == {"run": "translation", "steps": steps}
    found = load_file(out / "model.safetensors")
    expected = mean_of_exports(runs.translation, steps, tmp_path, "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mean.float()) for name, mean in expected.items())
    first = load_file(tmp_path / f"translation-{steps[0]}" / "model.safetensors")
    assert any(not torch.equal(found[name], first[name]) for name in found)


def test_the_best_are_averaged_in_the_type_of_the_run(runs: Runs, tmp_path: Path) -> None:
    assert command("average", runs.translation, tmp_path / "best", "--best") == 0
    steps = json.loads((tmp_path / "best" / "average.json").read_text())["steps"]
    losses = {}
    for line in (runs.translation / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "evaluation" and record["step"]:
            losses[record["step"]] = record["nll"]
    assert steps == sorted(sorted(losses, key=lambda step: losses[step])[:2])
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "best", dtype="auto").dtype == torch.bfloat16


def test_an_averaged_directory_is_evaluated_like_any_model(runs: Runs, tmp_path: Path) -> None:
    assert command("average", runs.translation, tmp_path / "model", "--last", 2) == 0
    languages = ["--source-language", "en_XX", "--target-language", "de_DE"]
    options = ["--beam-size", 2, "--max-length", 10, "--output", tmp_path / "scores", *languages]
    assert command("evaluate", tmp_path / "model", "--data", runs.rows, *options) == 0
    assert "bleu" in json.loads((tmp_path / "scores" / "scores.json").read_text())


def test_of_an_adapter_its_own_weights_are_averaged(runs: Runs, tmp_path: Path) -> None:
    assert command("average", runs.adapter, tmp_path / "average", "--last", 2) == 0
    found = load_file(tmp_path / "average" / "adapter_model.safetensors")
    expected = mean_of_exports(runs.adapter, [6, 8], tmp_path, "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mean.float()) for name, mean in expected.items())
    assert command("average", runs.adapter, tmp_path / "merged", "--last", 2, "--merge") == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_run_that_became_worse_ends_at_its_last_step_and_exports_its_best(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = tiny_run(
        tmp_path, tiny_models["mbart"], name="worse", checkpoint=SAVING, optimizer__lr=1.0,
        data__validation=str(write_pairs(tmp_path / "rows.tsv", PAIRS[:6])),
        schedule={"name": "linear", "warmup_steps": 7, "steps": 8}, evaluation={"every_steps": 2, "metrics": []},
        launch__processes=1,
    )  # fmt: skip
    done = harness("train", str(write_run(run)))
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = (json.loads(line) for line in (tmp_path / "worse" / "metrics.jsonl").read_text().splitlines())
    assert (last["event"], last["step"]) == ("stop", 8)
    summary = json.loads((tmp_path / "worse" / "summary.json").read_text())
    assert summary["exported_step"] < summary["steps"] == 8


def test_the_current_directory_is_not_replaced(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("average", "export"):
        assert command(verb, runs.adapter, ".") == 2
        assert "error: .: is the current directory, which cannot be replaced" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_warning_of_a_library_is_shown(runs: Runs, tmp_path: Path) -> None:
    done = harness("average", str(runs.adapter), str(tmp_path / "average"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--last", "9"], 3, "9 checkpoints or more is wanted, and 4 would be averaged\n  -> there are: 2, 4, 6, 8"),
        (["--last", "1"], 3, "2 checkpoints or more is wanted, and 1 would"),
        (["--steps", "4,5"], 3, "no checkpoint of step 5"),
        (["--steps", "4"], 3, "there are: 2, 4, 6, 8; checkpoint.keep_last and keep_best keep more"),
        (["--steps", "4,x"], 2, "must be a whole number"),
        (["--last", "2", "--best"], 2, "not allowed with"),
        (["--best"], 3, "and 0 would be averaged"),
        (["--merge", "--step", "3"], 2, "unrecognized arguments"),
    ],
)
def test_mistakes(
    runs: Runs, options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("average", runs.adapter, tmp_path / "out", *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
