"""What the engine may change about a run, and what it must not: offload, recomputation, precision, bad gradients.

All runs are made by one start of two ranks (tests/probed_worker.py), each some steps of several micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from harness.checkpoint.state import CheckpointTensors
from harness.cli.doctor import extensions_directory
from harness.errors import ExitCode, NonFiniteError
from tests.probed_worker import NAN_STEP
from tests.runs import SHARD_ALL, harness, run_ranks, same_state, steps_of, tiny_run, write_run
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WORKER = Path(__file__).parent.parent / "probed_worker.py"
PRESETS = ("zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("zero1_offload", "zero2_offload", "zero3_offload", "zero3_optimizer_offload")
LAYOUTS = (*PRESETS, *OFFLOADED)
BF16_LAYOUTS = (*PRESETS, "zero2_offload", "zero3_offload")
BAD_LAYOUTS = (*PRESETS, "zero2_offload", "zero3_offload")
SUMMED = ("zero1", "zero2", "zero3")
RESUMED = ("zero2_offload", "zero3_offload", "bf16-zero0", "bf16-zero1", "bf16-zero3", "adafactor")
NUM_STEPS, NUM_BAD_STEPS = 8, 5
BF16 = {"model__dtype": "bfloat16"}
ROUGH_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
SETTINGS: dict[str, Any] = {
    "batch__max_tokens_per_device": 60,
    "optimizer__clip_norm": 0.5,
    "schedule__name": "constant",
    "schedule__warmup_steps": 2,
    "schedule__steps": NUM_STEPS,
}
Runs = dict[str, dict[str, Any]]


def deepspeed_section(layout: str) -> dict[str, Any]:
    on_cpu = {"offload_optimizer": {"device": "cpu"}}
    if layout == "zero1_offload":
        return {"preset": "zero1", "overrides": {"zero_optimization": on_cpu}}
    if layout == "zero3_optimizer_offload":
        return {"preset": "zero3", "overrides": {"zero_optimization": {**SHARD_ALL["zero_optimization"], **on_cpu}}}
    return {"preset": layout, "overrides": SHARD_ALL if layout.startswith("zero3") else {}}


def wanted_runs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, layout, changes). Names with `nan` and `stopped` mean something to the worker."""
    bad = {"schedule__steps": NUM_BAD_STEPS, "checkpoint": {"every_steps": 1, "keep_last": NUM_BAD_STEPS}}
    many = {"batch__tokens_per_step": 1000, "schedule__steps": 2}
    for layout in LAYOUTS:
        yield layout, layout, {}
    for layout in ("zero2", "zero3"):
        yield f"recomputed-{layout}", layout, {"model__gradient_checkpointing": True}
    for layout in ("zero0", "zero3"):
        yield f"unclipped-{layout}", layout, {"optimizer__clip_norm": None}
    for layout in BF16_LAYOUTS:
        yield f"bf16-{layout}", layout, BF16
        yield f"untouched-{layout}", layout, BF16 | {"optimizer__lr": 1e-30, "schedule__steps": 2}
    for layout in PRESETS:
        yield f"random-{layout}", layout, {"model__path": None, "schedule__steps": 2}
        yield f"nan-bf16-{layout}", layout, bad | BF16
    for layout in SUMMED:
        yield f"summed-{layout}", layout, many | BF16
        yield f"roughly-summed-{layout}", layout, many | BF16
    yield "summed-exactly", "zero0", many
    for layout in BAD_LAYOUTS:
        yield f"nan-{layout}", layout, bad
    for layout in ("zero0", "zero2", "zero3"):
        yield f"diverging-{layout}", layout, {"optimizer__lr": 1e30}
    for name in RESUMED:
        changes = {"optimizer__name": "adafactor"} if name == "adafactor" else BF16 if "bf16" in name else {}
        layout = "zero0" if name == "adafactor" else name.removeprefix("bf16-")
        yield f"stopped-{name}", layout, changes
        if name == "adafactor":
            yield name, layout, changes


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("engine")
    found: Runs = {}
    for name, layout, changes in wanted_runs():
        run = tiny_run(
            directory, tiny_models["mbart"], name=name,
            **{**SETTINGS, "deepspeed": deepspeed_section(layout), **changes},
        )  # fmt: skip
        if name.startswith("random"):
            run["model"]["config"] = str(tiny_models["mbart"])
        if name.startswith("roughly"):
            run["deepspeed"]["overrides"] = run["deepspeed"]["overrides"] | ROUGH_SUMS
        found[name] = run
    once_more = [run for name, run in found.items() if name.startswith("stopped")]
    run_ranks([*found.values(), *once_more], world_size=2, worker=WORKER, timeout_s=1700)
    return found


def run_dir(run: dict[str, Any]) -> Path:
    return Path(run["output_dir"]) / run["name"]


def checkpoint(run: dict[str, Any], step: int = NUM_STEPS) -> Path:
    return run_dir(run) / "checkpoints" / f"step-{step:08d}"


def probes(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank has seen."""
    return [json.loads((run_dir(run) / f"probe-{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_path(run: dict[str, Any], reference: dict[str, Any], rel: float) -> None:
    for key in ("loss", "nll", "grad_norm"):
        ours, theirs = ([step[key] for step in steps_of(one)] for one in (run, reference))
        assert ours == pytest.approx(theirs, rel=rel), (run["name"], key)
        print(run["name"], key, max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)))


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "recomputed-zero2", "recomputed-zero3"])
def test_offload_and_recomputation_change_nothing(layout: str, runs: Runs) -> None:
    assert len(steps_of(runs[layout])) == NUM_STEPS
    assert_same_path(runs[layout], runs["zero0"], rel=1e-5)


def test_the_number_of_micro_steps_differs_from_step_to_step(runs: Runs) -> None:
    counts = [probe["num_forward"] for probe in probes(runs["zero2"])]
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 2
    assert len(set(counts[0].values())) > 1


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bfloat16_follows_float32(layout: str, runs: Runs) -> None:
    """bfloat16 has 8 significant bits (2^-8 = 4e-3). The loss is a float32 mean over some hundred tokens, in which
    single errors average out, and so is the norm over many values. Seen: 1e-4 and 2e-3."""
    steps, reference = steps_of(runs[f"bf16-{layout}"]), steps_of(runs["zero0"])
    for key, rel in (("loss", 5e-4), ("nll", 5e-4), ("grad_norm", 5e-3)):
        ours, theirs = ([step[key] for step in one] for one in (steps, reference))
        print(layout, key, max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)))
        assert ours == pytest.approx(theirs, rel=rel), key
    losses = [step["loss"] for step in steps]
    assert losses != torch.tensor(losses).bfloat16().tolist()  # not a bfloat16 number: it is computed in float32


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bfloat16_masters_start_as_the_float32_weights_and_adam_at_step_one(layout: str, runs: Runs) -> None:
    """The run's learning rate is too small to change a weight."""
    run = runs[f"untouched-{layout}"]
    tensors = CheckpointTensors(checkpoint(run, 2))
    with safe_open(Path(run["model"]["path"]) / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) - set(tensors.names()) <= {"final_logits_bias"}
        for name in tensors.names():
            torch.testing.assert_close(tensors.whole(name), file.get_tensor(name), rtol=0.0, atol=1e-29)
    assert set(tensors.num_updates.values()) == {2}


@pytest.mark.parametrize("layout", SUMMED)
def test_bfloat16_gradients_are_summed_in_float32(layout: str, runs: Runs) -> None:
    """Over the eleven micro-batches of a step; the run file can ask for bfloat16 sums, which are worse."""
    assert max(probes(runs[f"summed-{layout}"])[0]["num_forward"].values()) == 11
    exact = first_moments(runs["summed-exactly"])
    ours, rough = (
        float((first_moments(runs[f"{prefix}summed-{layout}"]) - exact).norm() / exact.norm())
        for prefix in ("", "roughly-")
    )
    print(layout, ours, rough)
    assert ours < 0.97 * rough  # the rest is the rounding of forward and backward passes


def first_moments(run: dict[str, Any], step: int = 2) -> torch.Tensor:
    tensors = CheckpointTensors(checkpoint(run, step))
    return torch.cat([tensors.whole(name, "exp_avg").flatten() for name in tensors.names()])


@pytest.mark.parametrize("layout", ["zero0", "zero3"])
def test_clipping_can_be_switched_off(layout: str, runs: Runs) -> None:
    run = runs[f"unclipped-{layout}"]
    assert {step["clip_norm"] for probe in probes(run) for step in probe["steps"].values()} == {0.0}
    assert_same_path(run, runs["unclipped-zero0"], rel=1e-5)
    clipped = steps_of(runs[layout])
    assert steps_of(run)[0]["grad_norm"] == pytest.approx(clipped[0]["grad_norm"], rel=1e-5)  # before clipping
    assert steps_of(run)[0]["grad_norm"] > 0.5
    assert not same_state(checkpoint(run), checkpoint(runs[layout]))


@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"bf16-{layout}" for layout in BF16_LAYOUTS)])
def test_ranks_agree_on_rate_norm_limit_and_weights(layout: str, runs: Runs) -> None:
    first, second = (probe["steps"] for probe in probes(runs[layout]))
    assert first == second
    assert all(len(set(step["lr"])) == 1 for step in first.values())
    assert len({step["weights"] for step in first.values()}) == NUM_STEPS


def test_random_weights_are_the_same_on_every_rank_and_stage(runs: Runs) -> None:
    digests = {probe["initial"] for layout in PRESETS for probe in probes(runs[f"random-{layout}"])}
    assert len(digests) == 1
    assert digests.isdisjoint({probe["initial"] for probe in probes(runs["zero0"])})
    norms = [steps_of(runs[f"random-{layout}"])[0]["grad_norm"] for layout in PRESETS]
    assert norms == pytest.approx(norms[:1] * len(norms), rel=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_where_the_unbroken_one_does(name: str, runs: Runs) -> None:
    """float32 with every preset is the matter of tests/faults/test_resume.py."""
    run = runs[f"stopped-{name}"]
    records = [json.loads(line) for line in (run_dir(run) / "metrics.jsonl").read_text().splitlines()]
    assert "restart" in [record["event"] for record in records]
    assert same_state(checkpoint(run), checkpoint(runs[name]))


def test_adafactor_trains(runs: Runs) -> None:
    losses = [step["loss"] for step in steps_of(runs["adafactor"])]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [*BAD_LAYOUTS, *(f"bf16-{layout}" for layout in PRESETS)])
def test_a_bad_gradient_on_one_rank_is_applied_on_none(name: str, runs: Runs) -> None:
    run = runs[f"nan-{name}"]
    records = [json.loads(line) for line in (run_dir(run) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "skip"] == [NAN_STEP]
    bad = steps_of(run)[NAN_STEP - 1]
    assert bad["grad_norm"] is None  # not finite
    assert bad["loss"] is not None

    first, second = (probe["steps"] for probe in probes(run))
    for step in map(str, range(1, NUM_BAD_STEPS + 1)):
        assert first[step]["weights"] == second[step]["weights"]
        assert first[step]["applied"] == second[step]["applied"] == (step != str(NAN_STEP))
    assert first[str(NAN_STEP)]["weights"] == first[str(NAN_STEP - 1)]["weights"]
    assert same_state(checkpoint(run, NAN_STEP), checkpoint(run, NAN_STEP - 1))

    following = [step for step in steps_of(run) if step["step"] > NAN_STEP]
    assert len(following) == NUM_BAD_STEPS - NAN_STEP
    assert len({step["weights"] for step in first.values()}) == NUM_BAD_STEPS - 1
    dtype = "bf16-" if "bf16" in name else ""
    theirs = [step for step in steps_of(runs[f"nan-{dtype}zero1"]) if step["step"] > NAN_STEP]
    rel = 2e-2 if dtype else 1e-5
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in following] == pytest.approx([step[key] for step in theirs], rel=rel)


@pytest.mark.parametrize("layout", ["zero0", "zero2", "zero3"])
def test_a_run_that_diverges_ends_at_its_last_good_step(layout: str, runs: Runs) -> None:
    run = runs[f"diverging-{layout}"]
    steps = steps_of(run)
    assert steps[0]["grad_norm"] is not None
    for probe in probes(run):
        applied = [step["applied"] for step in probe["steps"].values()]
        assert applied[-3:] == [False] * 3
        assert all(applied[:-3])
    first, second = ([step["weights"] for step in probe["steps"].values()] for probe in probes(run))
    assert first == second
    assert len(set(first[-4:])) == 1
    report = json.loads((run_dir(run) / "nonfinite.json").read_text())
    assert report["step"] == steps[-1]["step"]
    assert len(report["rows"]) == steps[-1]["rows"]
    for rank in (0, 1):
        assert "3 steps in a row" in (run_dir(run) / f"error-{rank}.txt").read_text()


def test_a_diverging_run_exits_with_its_own_code(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny_models["mbart"], name="run", optimizer__lr=1e30, launch__processes=2)
    done = harness("train", str(write_run(run)))
    assert done.returncode == ExitCode.NON_FINITE == NonFiniteError.exit_code == 5
    assert "not finite for 3 steps" in done.stderr
    assert "nonfinite.json" in done.stderr
    assert "Traceback" not in done.stderr


def is_compiled(op: str) -> bool:
    return any(extensions_directory().glob(f"**/{op}/{op}.so"))


@pytest.mark.skipif(not is_compiled("async_io"), reason="needs `harness doctor --build-ops async_io` (minutes)")
def test_nvme_offload_changes_nothing_and_keeps_its_moments(tmp_path: Path) -> None:
    """The model is large enough for its tensors to be swapped: DeepSpeed keeps those below a MiB in memory."""
    model = make_tiny_model("mbart", tmp_path / "model", d_model=256)
    on_nvme = {"preset": "zero3_nvme", "nvme_path": str(tmp_path), "overrides": SHARD_ALL}
    whole, stopped, reference = (
        tiny_run(tmp_path, model, name=name, **{**SETTINGS, "deepspeed": section})
        for name, section in (("whole", on_nvme), ("stopped", on_nvme), ("zero3", deepspeed_section("zero3")))
    )
    run_ranks([whole, stopped, stopped, reference], world_size=2, worker=WORKER)
    assert len(list(tmp_path.rglob("*.tensor.swp"))) > 2
    assert_same_path(whole, reference, rel=1e-5)
    assert first_moments(whole, NUM_STEPS).norm() > 0
    assert same_state(checkpoint(whole), checkpoint(stopped))
