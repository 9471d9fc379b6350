"""LoRA beside a base in 4 bits: the same steps on every layout, untouched by evaluations, close to the 16-bit base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.llm_runs import PRESETS, Q4, last_checkpoint, llm_run, weights_of, write_talks
from tests.pairs import PAIRS
from tests.runs import run_ranks, same_state, steps_of
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow

RANKS = (1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for whole blocks of 64 weights."""
    return make_tiny_llm(tmp_path_factory.mktemp("base") / "model", hidden_size=64, intermediate_size=128)


def qlora_run(directory: Path, model: Path, *, name: str, **changes: Any) -> dict[str, Any]:
    options = {"model__quantization": Q4, "adapter": {"rank": 4}, "optimizer__lr": 5e-3}
    return llm_run(directory, model, name=name, **(options | changes))


def records_of(run: dict[str, Any], event: str) -> list[dict[str, Any]]:
    path = Path(run["output_dir"]) / run["name"] / "metrics.jsonl"
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["event"] == event]


def test_steps_and_final_adapters_do_not_depend_on_the_layout(model: Path, tmp_path: Path) -> None:
    runs = {
        world_size: [
            qlora_run(tmp_path, model, name=f"w{world_size}-{preset}", preset=preset, adapter={"rank": 4})
            for preset in PRESETS
        ]
        for world_size in RANKS
    }
    for world_size, group in runs.items():
        run_ranks(group, world_size)
    reference, weights = steps_of(runs[1][0]), weights_of(runs[1][0])
    assert len(reference) == 12
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.2
    assert len(weights) == 2 * 7 * 2, "factors A and B of the seven linear layers of both blocks"
    for run in [*runs[1], *runs[2]]:
        steps, name = steps_of(run), run["name"]
        assert [step["row_digest"] for step in steps] == [step["row_digest"] for step in reference]
        for key in ("loss", "grad_norm"):
            assert [step[key] for step in steps] == pytest.approx([step[key] for step in reference], rel=1e-5), name
        ours = weights_of(run)
        assert ours.keys() == weights.keys()
        assert max(float((ours[name] - weights[name]).abs().max()) for name in weights) < 5e-6, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluating_in_between_changes_nothing(dtype: str, model: Path, tmp_path: Path) -> None:
    """bitsandbytes lays 4-bit weights out anew when it first meets them in evaluation mode on a CPU with AVX512-BF16:
    the layers below the topmost then had no gradient."""
    evaluation = {"initial": True, "every_steps": 4, "metrics": ["chrf"], "beam_size": 2, "max_target_length": 6}
    changes = {"model__dtype": dtype, "data__validation": write_talks(tmp_path / "dev.jsonl", PAIRS[:4])}
    runs = [
        qlora_run(tmp_path, model, name=f"{preset}-{bool(options)}", preset=preset, evaluation=options, **changes)
        for preset in ("zero2", "zero3")
        for options in (None, evaluation)
    ]
    run_ranks(runs, world_size=2)
    for alone, evaluated in (runs[:2], runs[2:]):
        assert [record["step"] for record in records_of(evaluated, "evaluation")] == [0, 4, 8, 12]
        for key in ("loss", "grad_norm"):
            assert [step[key] for step in steps_of(evaluated)] == [step[key] for step in steps_of(alone)], key
        assert same_state(last_checkpoint(evaluated), last_checkpoint(alone))
        assert all(weight.any() for weight in weights_of(evaluated).values()), "every layer has learnt"


def test_the_loss_is_close_to_that_of_the_16_bit_base(model: Path, tmp_path: Path) -> None:
    """A base that has learnt something, in 4 and in 16 bits: as it is, and with an adapter trained on it."""
    base = llm_run(tmp_path, model, name="base", schedule__steps=120, batch__tokens_per_step=1280)
    run_ranks([base], world_size=1)
    changes = {
        "model__dtype": "bfloat16", "evaluation": {"initial": True, "metrics": []}, "schedule__steps": 20,
        "data__validation": write_talks(tmp_path / "dev.jsonl", PAIRS[:12]),
    }  # fmt: skip
    export = tmp_path / "base" / "export"
    runs = [
        qlora_run(tmp_path, export, name=str(quantization), model__quantization=quantization, **changes)
        for quantization in (None, Q4)
    ]
    run_ranks(runs, world_size=1)
    (start_16, end_16), (start_4, end_4) = ([record["nll"] for record in records_of(run, "evaluation")] for run in runs)
    print(start_16, end_16, start_4, end_4, steps_of(base)[-1]["loss"])
    assert start_16 < steps_of(base)[0]["nll"] - 2.0, "the base has learnt"
    assert start_16 != start_4
    assert start_4 == pytest.approx(start_16, abs=0.1)
    assert end_16 < start_16
    assert end_4 == pytest.approx(end_16, abs=0.1)
