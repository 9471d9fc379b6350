"""The real-size examples train: each run file with a tiny model of its family and a few rows in place of its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.config.load import load_run_config
from harness.io.atomic import read_json
from tests.pairs import PAIRS
from tests.runs import run_ranks, steps_of, write_pairs

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILIES = {
    "mbart-large-cc25-en-ro": "mbart",
    "mbart50-many-to-many": "mbart50",
    "nllb-600m": "nllb",
    "nllb-3.3b-zero3": "nllb",
    "t5-base": "t5",
    "marian-opus": "marian",
}


def write_side(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def small(name: str, directory: Path, models: dict[str, Path]) -> dict[str, Any]:
    """The example with its model, files, sizes and length made small; everything else stays."""
    run: dict[str, Any] = load_run_config(EXAMPLES / f"{name}.yaml", [], accelerator="cpu").model_dump(mode="json")
    table = str(write_pairs(directory / f"{name}.tsv", PAIRS[:12]))
    sides = {
        "source": write_side(directory / f"{name}.source", [source for source, _ in PAIRS[:12]]),
        "target": write_side(directory / f"{name}.target", [target for _, target in PAIRS[:12]]),
    }
    data = run["data"]
    for source in data["train"]:
        source |= {"path": table} if source["path"] else sides
    for evaluation_set in ("validation", "test"):
        if data["source_language"] is None and data["train"][0]["source_language"]:  # the rows name their languages
            rows = ["source\ttarget\tsource_language\ttarget_language"]
            rows += [f"{source}\t{target}\ten_XX\tro_RO" for source, target in PAIRS[:6]]
            data[evaluation_set] = write_side(directory / f"{name}-{evaluation_set}.tsv", rows)
        else:
            data[evaluation_set] = table
    data |= {"max_source_length": 80, "max_target_length": 80}
    run |= {"name": name, "output_dir": str(directory), "batch": {"tokens_per_step": 400, "max_tokens_per_device": 200}}
    run["model"]["path"] = str(models[FAMILIES[name]])
    run["schedule"] |= {"steps": 2, "epochs": None, "warmup_steps": min(1, run["schedule"]["warmup_steps"])}
    run["evaluation"] |= {"every_steps": 1, "max_target_length": 10}
    run["checkpoint"]["every_steps"] = 1
    return run


@pytest.mark.slow
def test_every_real_size_example_trains_with_a_tiny_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    runs = [small(name, tmp_path, tiny_models) for name in FAMILIES]
    run_ranks(runs, 1)
    for run in runs:
        directory = tmp_path / run["name"]
        steps = steps_of(run)
        assert [step["step"] for step in steps] == [1, 2], run["name"]
        assert steps[1]["grad_norm"] > 0
        assert set(read_json(directory / "summary.json")["test"]) == {"loss", "nll", *run["evaluation"]["metrics"]}
        assert (directory / "export" / "model.safetensors").is_file()
        shutil.rmtree(directory)
