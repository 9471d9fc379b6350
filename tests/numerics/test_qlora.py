"""LoRA beside a base in 4 bits: the same steps on every layout, untouched by evaluations, close to the 16-bit base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from harness.config.schema import ModelConfig, QuantizationConfig
from harness.models.load import load_model, load_tokenizer
from harness.models.quantization import dequantize
from tests.llm_runs import PRESETS, Q4, evaluations_of, last_checkpoint, llm_run, weights_of, write_talks
from tests.pairs import PAIRS
from tests.runs import run_ranks, same_state, steps_of
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow

Run = dict[str, Any]
EVALUATED = [("zero2", "float32"), ("zero2", "bfloat16"), ("zero3", "bfloat16")]
HALVES = {"half": PAIRS[:21], "dev": PAIRS[21:33]}


class Runs(NamedTuple):
    """`rounded`: on a plain base that has the rounded weights. `evaluated`: by ZeRO stage and dtype, the same run
    without and with evaluations."""

    layouts: list[Run]
    rounded: Run
    evaluated: dict[tuple[str, str], tuple[Run, Run]]
    base: Run
    in_16_bits: Run
    in_4_bits: Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of this file, by two groups of processes. The base has learnt half of the pairs."""
    directory = tmp_path_factory.mktemp("qlora")
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    model = make_tiny_llm(directory / "model", **shape)  # whole blocks of 64 weights
    half, dev = (write_talks(directory / f"{name}.jsonl", part) for name, part in HALVES.items())
    base = llm_run(directory, model, name="base", schedule__steps=60, data__train=[{"path": half}])

    def run_of(name: str, model: Path = model, **changes: Any) -> Run:
        options = {"model__quantization": Q4, "adapter": {"rank": 4}, "optimizer__lr": 5e-3, "data__validation": dev}
        return llm_run(directory, model, name=name, **(options | changes))

    layouts = {size: [run_of(f"w{size}-{preset}", preset=preset) for preset in PRESETS] for size in (1, 2)}
    rounded = run_of("rounded", with_rounded_weights(model, directory / "rounded-model"), model__quantization=None)
    decoding = {"every_steps": 4, "metrics": ["chrf"], "beam_size": 2, "max_target_length": 6}
    evaluated: dict[tuple[str, str], tuple[Run, Run]] = {}
    for preset, dtype in EVALUATED:  # not packed, since the probe of packing is an evaluation too
        changes = {"preset": preset, "model__dtype": dtype, "data__packing": False}
        pair = [run_of(f"{preset}-{dtype}-{bool(one)}", **changes, evaluation=one) for one in (None, decoding)]
        evaluated[preset, dtype] = pair[0], pair[1]
    closeness = {"model__dtype": "bfloat16", "evaluation": {"metrics": []}, "schedule__steps": 20}
    in_16_bits = run_of("in-16-bits", directory / "base" / "export", **closeness, model__quantization=None)
    in_4_bits = run_of("in-4-bits", directory / "base" / "export", **closeness)
    run_ranks([base, in_16_bits, in_4_bits, rounded, *layouts[1]], world_size=1, timeout_s=600.0)
    run_ranks([*layouts[2], *(run for pair in evaluated.values() for run in pair)], world_size=2, timeout_s=600.0)
    return Runs([*layouts[1], *layouts[2]], rounded, evaluated, base, in_16_bits, in_4_bits)


def with_rounded_weights(model: Path, directory: Path) -> Path:
    """`model` rounded to 4 bits, as a plain model in float32."""
    quantized = load_model(ModelConfig(path=str(model), quantization=QuantizationConfig()), 0, task="causal_lm")
    dequantize(quantized, torch.float32).save_pretrained(directory)
    load_tokenizer(model).save_pretrained(directory)
    return directory


def test_steps_and_final_adapters_do_not_depend_on_the_layout(runs: Runs) -> None:
    reference, weights = steps_of(runs.layouts[0]), weights_of(runs.layouts[0])
    assert len(reference) == 12
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.2
    assert len(weights) == 2 * 7 * 2, "factors A and B of the seven linear layers of both blocks"
    for run in runs.layouts:
        steps, ours = steps_of(run), weights_of(run)
        assert [step["row_digest"] for step in steps] == [step["row_digest"] for step in reference]
        for key in ("loss", "grad_norm"):
            assert [step[key] for step in steps] == pytest.approx([step[key] for step in reference], rel=1e-5), run
        assert ours.keys() == weights.keys()
        assert max(float((ours[name] - weights[name]).abs().max()) for name in weights) < 5e-6, run["name"]


def test_it_learns_what_an_adapter_on_the_rounded_weights_learns(runs: Runs) -> None:
    ours, theirs = steps_of(runs.layouts[0]), steps_of(runs.rounded)
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in ours] == pytest.approx([step[key] for step in theirs], rel=1e-5), key


@pytest.mark.parametrize(("preset", "dtype"), EVALUATED)
def test_evaluating_in_between_changes_nothing(preset: str, dtype: str, runs: Runs) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would lay 4-bit weights out anew at the first evaluation in bfloat16:
    the steps after it would have no gradient below the topmost layer."""
    alone, evaluated = runs.evaluated[preset, dtype]
    assert [record["step"] for record in evaluations_of(evaluated)] == [0, 4, 8, 12]
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in steps_of(evaluated)] == [step[key] for step in steps_of(alone)], key
    assert same_state(last_checkpoint(evaluated), last_checkpoint(alone))
    assert all(weight.any() for weight in weights_of(evaluated).values()), "every layer has learnt"


def test_the_loss_is_close_to_that_of_the_16_bit_base(runs: Runs) -> None:
    """As the base is, and with an adapter trained on it."""
    assert steps_of(runs.base)[-1]["nll"] < steps_of(runs.base)[0]["nll"] - 2.0, "the base has learnt"
    start_16, end_16 = (record["nll"] for record in evaluations_of(runs.in_16_bits))
    start_4, end_4 = (record["nll"] for record in evaluations_of(runs.in_4_bits))
    assert end_16 < start_16 - 0.2
    assert start_4 != start_16
    assert start_4 == pytest.approx(start_16, abs=0.1)
    assert end_4 == pytest.approx(end_16, abs=0.1)
