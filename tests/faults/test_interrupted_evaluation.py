"""An evaluation that is stopped in the middle keeps the rows it has decoded, also for another number of ranks: in a run
and in `harness evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness.cli.main import main
from harness.errors import ExitCode
from harness.io.atomic import read_json, write_json
from tests.pairs import PAIRS
from tests.runs import SHARD_ALL, harness, tiny_run, write_pairs, write_run
from tests.tiny import talkative

pytestmark = pytest.mark.slow

NUM_STEPS, NUM_ROWS = 4, 24
TEXT_FILES = ("hypotheses.txt", "sources.txt", "references.txt")
KEPT = "This output was there before the restart."


def run_file(directory: Path, model: Path, *, name: str) -> str:
    run = tiny_run(
        directory, model, name=name, deepspeed={"preset": "zero3", "overrides": SHARD_ALL},
        data__validation=str(write_pairs(directory / "held-out.tsv", PAIRS[:NUM_ROWS])),
        schedule__steps=NUM_STEPS, schedule__warmup_steps=1, launch__processes=2,
        evaluation={
            "initial": False, "beam_size": 2, "max_target_length": 40, "max_tokens_per_device": 120,
            "metrics": ["chrf"],
        },
    )  # fmt: skip
    return str(write_run(run))


def hypotheses(run_dir: Path) -> list[str]:
    path = run_dir / "evaluations" / f"step-{NUM_STEPS:08d}-validation" / "hypotheses.txt"
    return path.read_text(encoding="utf-8").splitlines()


def test_stopped_in_the_middle_of_its_last_evaluation(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = talkative(tiny_models["mbart"], tmp_path / "model")
    unbroken, stopped = (run_file(tmp_path, model, name=name) for name in ("unbroken", "stopped"))
    assert harness("train", unbroken).returncode == ExitCode.DONE

    first = harness("train", stopped, HARNESS_FAULT="decode:4:SIGTERM", HARNESS_FAULT_RANK="1")
    assert first.returncode == ExitCode.INTERRUPTED, first.stderr
    partial = tmp_path / "stopped" / "evaluations" / f".step-{NUM_STEPS:08d}-validation.partial"
    files = sorted(partial.iterdir())
    assert [path.name for path in files] == ["after-0-rank-0.json", "after-0-rank-1.json"]
    content = read_json(files[1])
    row = next(iter(content["rows"]))
    content["rows"][row][0][0] = KEPT
    files[1].write_text(json.dumps(content))
    num_kept = sum(len(read_json(path)["rows"]) for path in files)
    assert 1 < num_kept < NUM_ROWS

    second = harness("train", stopped, "launch.processes=1")
    assert second.returncode == ExitCode.DONE, second.stderr
    expected = hypotheses(tmp_path / "unbroken")
    assert len(set(expected)) > NUM_ROWS / 2
    assert hypotheses(tmp_path / "stopped") == [*expected[: int(row)], KEPT, *expected[int(row) + 1 :]]
    assert not partial.exists()


def arguments(model: Path, output: Path, *options: str) -> list[str]:
    """`harness evaluate` of the rows beside `model`; of options that come twice the last one counts."""
    languages = ("--source-language", "en_XX", "--target-language", "de_DE")
    search = ("--beam-size", "2", "--max-length", "40", "--max-tokens", "120", "evaluation.num_hypotheses=2")
    data = str(model.with_name("held-out.tsv"))
    return ["evaluate", str(model), "--data", data, "--output", str(output), *languages, *search, *options]


def written(output: Path) -> tuple[dict[str, Any], list[float]]:
    """The files of an evaluation but the page, without the time that it took; and the scores of all outputs, which have
    other last digits in other batches."""
    files = {name: (output / name).read_text(encoding="utf-8") for name in TEXT_FILES}
    scores = read_json(output / "scores.json")
    assert scores.pop("decode_seconds") > 0
    n_best = [json.loads(line) for line in (output / "nbest.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [[one["text"] for one in row["outputs"]] for row in n_best]
    return files | {"scores.json": scores, "texts": texts}, [one["score"] for row in n_best for one in row["outputs"]]


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated")
    write_pairs(directory / "held-out.tsv", PAIRS[:NUM_ROWS])
    return talkative(tiny_models["mbart"], directory / "model")


@pytest.fixture(scope="module")
def unbroken(model: Path) -> tuple[dict[str, Any], list[float]]:
    output = model.with_name("unbroken")
    assert main(arguments(model, output)) == ExitCode.DONE
    return written(output)


@pytest.mark.parametrize(("before", "signal", "after"), [(1, "SIGUSR2", 2), (2, "SIGTERM", 1)])
def test_harness_evaluate_goes_on(
    model: Path, unbroken: tuple[dict[str, Any], list[float]], tmp_path: Path, before: int, signal: str, after: int
) -> None:
    output, changed = tmp_path / "stopped", tmp_path / "changed"
    rank = {"HARNESS_FAULT_RANK": "1"} if before == 2 else {}
    stopped = harness(*arguments(model, output), "--processes", str(before), HARNESS_FAULT=f"decode:4:{signal}", **rank)
    assert stopped.returncode == ExitCode.INTERRUPTED, stopped.stderr
    assert "harness: stopped in the middle of the evaluation; rows that are decoded are kept" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not output.exists()
    assert 1 < change_kept_rows(output, partial_of(changed)) < NUM_ROWS

    done = harness(*arguments(model, output), "--processes", str(after))
    assert done.returncode == ExitCode.DONE, done.stderr
    files, scores = written(output)
    assert files == unbroken[0]
    assert scores == pytest.approx(unbroken[1], abs=1e-5)
    assert not partial_of(output).exists()
    assert main(arguments(model, changed)) == ExitCode.DONE
    assert KEPT in (changed / "hypotheses.txt").read_text(encoding="utf-8")


def change_kept_rows(output: Path, partial: Path) -> int:
    """Copies what an interrupted evaluation to `output` has kept, with other texts; gives the number of rows."""
    num_rows = 0
    for file in partial_of(output).iterdir():
        content = read_json(file)
        num_rows += len(content["rows"])
        content["rows"] = {row: [[KEPT, *rest] for _, *rest in best] for row, best in content["rows"].items()}
        write_json(partial / file.name, content)
    return num_rows


def test_rows_of_another_model_or_search_do_not_count(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    stopped = harness(*arguments(model, output), HARNESS_FAULT="decode:4:SIGINT")
    assert stopped.returncode == ExitCode.INTERRUPTED, stopped.stderr

    other = tmp_path / "model"
    shutil.copytree(model, other)
    shutil.copy(model.with_name("held-out.tsv"), tmp_path)
    weights = load_file(other / "model.safetensors")
    weights["model.shared.weight"][0, 0] *= 1 + 1e-6  # the loss is the same to all digits that are looked at
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    reordered = tmp_path / "reordered" / "model"
    shutil.copytree(model, reordered)
    write_pairs(reordered.with_name("held-out.tsv"), PAIRS[NUM_ROWS - 1 :: -1])
    changes: list[tuple[Path, list[str]]] = [
        (other, []), (reordered, []), (model, ["--length-penalty", "1.1"]), (model, ["--dtype", "bfloat16"]),
    ]  # fmt: skip
    for subject, options in changes:
        assert change_kept_rows(output, partial_of(tmp_path / "again")) > 1
        assert main([*arguments(subject, tmp_path / "again"), *options]) == ExitCode.DONE
        assert KEPT not in (tmp_path / "again" / "hypotheses.txt").read_text(encoding="utf-8")
        assert not partial_of(tmp_path / "again").exists()
