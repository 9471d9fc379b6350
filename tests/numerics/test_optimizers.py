"""Every optimizer at every stage that the run file allows, against plain PyTorch in one process.

All runs are made by one start of two ranks (tests/engine_worker.py) with engine and checkpoints alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from harness.checkpoint.state import CheckpointTensors
from harness.models.layers import embedding_names
from harness.plan.layers import layer_places
from tests.engine_worker import PEAK, Case, digest, loss_sum, make_model, rate_at, rows_of, write_cases
from tests.runs import REPOSITORY, same_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WORKER = Path(__file__).parent.parent / "engine_worker.py"
ALL = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))
SOME = ((0, False), (2, False), (3, True))
LAYOUTS: dict[str, tuple[tuple[int, bool], ...]] = {
    "adamw": ALL,
    "deepspeed": ALL,
    "paged_adamw": SOME,
    "lion": SOME,
    "adamw_8bit": ALL[:4],
    "paged_adamw_8bit": ALL[:1],
    "adafactor": ALL[:1],
    "muon": ALL[:1],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "deepspeed": {"implementation": "deepspeed"},
    "paged_adamw": {"name": "paged_adamw"},
    "lion": {"name": "lion", "lr": 1e-4},
    "adamw_8bit": {"name": "adamw_8bit"},
    "paged_adamw_8bit": {"name": "paged_adamw_8bit"},
    "adafactor": {"name": "adafactor"},
    "muon": {"name": "muon"},
}
# All but embeddings and the decoder's top layer; the encoder joins in after step 3, the decoder's lower layer after 6.
PHASES = [{"embeddings": True}, {"encoder": "all", "until_step": 3}, {"decoder": "0", "until_step": 6}]
NUM_STEPS = 10


def name_of(optimizer: str, layout: tuple[int, bool]) -> str:
    return f"{optimizer}-{layout[0]}{'-offload' * layout[1]}"


def wanted_cases() -> Iterator[Case]:
    for optimizer, settings in SETTINGS.items():
        for layout in LAYOUTS[optimizer]:
            case = Case(name_of(optimizer, layout), *layout, optimizer=settings, steps=NUM_STEPS)
            yield case
            if optimizer != "adamw":  # its resume is the matter of tests/faults/test_resume.py
                yield replace(case, name=f"{case.name}-resumed", reopen_at=[4])
    yield Case("bf16-fused", dtype="bfloat16", optimizer=SETTINGS["deepspeed"], steps=NUM_STEPS)
    for stage in range(4):
        phases = Case(f"phases-{stage}", stage, freeze=PHASES, steps=NUM_STEPS)
        yield phases
        yield replace(phases, name=f"phases-{stage}-resumed", reopen_at=[2, 4, 7])
    yield Case("frozen-later", 2, freeze=PHASES[:1], first="adamw-2")
    yield Case("8bit-moved", 3, optimizer=SETTINGS["adamw_8bit"], first="adamw_8bit-2", steps=NUM_STEPS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("optimizers")
    # Compiled once on a machine, by one process: ranks that compile wait for each other.
    ops = [sys.executable, "-m", "harness.engine.build_ops", "cpu_adam", "fused_adam"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja is there
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": path}
    subprocess.run(ops, env=environment, check=True, timeout=600)
    write_cases(directory, list(wanted_cases()))
    logs = [directory / f"rank-{rank}.log" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory), str(rank), "2"],
            env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [rank.wait(1400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return directory


def seen(runs: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((runs / f"{name}.json").read_text()))


def checkpoint(runs: Path, name: str, step: int = NUM_STEPS) -> Path:
    return runs / name / f"step-{step:08d}"


def weights(runs: Path, name: str, step: int = NUM_STEPS) -> dict[str, Tensor]:
    tensors = CheckpointTensors(checkpoint(runs, name, step))
    return {name: tensors.whole(name) for name in tensors.names()}


Groups = list[dict[str, Any]]


def plain_run(make: Callable[[Any, Groups], list[Any]], *, lr: float = PEAK) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of a loop without engine; `make` gets the model and its two groups."""
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers, losses = make(model, groups), []
    for step in range(NUM_STEPS):
        losses.append(plain_step(model, optimizers, step, lr))
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def plain_step(model: Any, optimizers: list[Any], step: int, lr: float) -> float:
    rows = rows_of(step + 1)
    loss = loss_sum(model, rows) / rows.numel()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


class PlainLion:
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, groups: Groups) -> None:
        self.param_groups = groups
        self.momenta: dict[Any, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.momenta.setdefault(p, torch.zeros_like(p))
                update = (0.9 * m + (1 - 0.9) * p.grad).sign()
                p -= group["lr"] * (update + group["weight_decay"] * p)
                m.copy_(0.98 * m + (1 - 0.98) * p.grad)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def plain_muon(model: Any, groups: Groups) -> list[Any]:
    names = dict(model.named_parameters())
    hidden = [names[name] for name in layer_places(names) if names[name].ndim == 2]
    embeddings = [names[name] for name in embedding_names(model)]
    assert len(hidden) + len(embeddings) == len(groups[0]["params"])
    muon = torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([{"params": embeddings, "weight_decay": 0.1}, groups[1]], **ADAM)]


ADAM: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6}
PLAIN: dict[str, Callable[[Any, Groups], list[Any]]] = {
    "adamw": lambda model, groups: [torch.optim.AdamW(groups, **ADAM)],
    "lion": lambda model, groups: [PlainLion(groups)],
    "adamw_8bit": lambda model, groups: [bitsandbytes.optim.AdamW8bit(groups, **ADAM)],
    "adafactor": lambda model, groups: [torch.optim.Adafactor(groups)],
    "muon": plain_muon,
}


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    return {name: plain_run(make, lr=SETTINGS[name].get("lr", PEAK)) for name, make in PLAIN.items()}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor], without: str = "") -> Tensor:
    """Of all weights but those whose name ends with `without`."""
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if not (without and name.endswith(without))]
    return torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in names])


# A bias of keys shifts all scores of a row alike: its gradient is rounding, of which Adam and Lion make whole steps.
NO_GRADIENT = "k_proj.bias"


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [(name, layout) for name in ("adamw", "deepspeed", "paged_adamw") for layout in LAYOUTS[name]],
)
def test_adamw_is_the_same_in_all_three_implementations(
    optimizer: str, layout: tuple[int, bool], runs: Path, plain: Any
) -> None:
    found = differences(weights(runs, name_of(optimizer, layout)), plain["adamw"][0])
    print(optimizer, layout, float(found.max()))
    assert found.max() < 1e-5
    assert seen(runs, name_of(optimizer, layout))["losses"] == pytest.approx(plain["adamw"][1], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS["lion"])
def test_lion_is_its_formula(layout: tuple[int, bool], runs: Path, plain: Any) -> None:
    """An update is a sign: where the sum is almost zero, rounding decides, so single weights may differ by steps."""
    found = differences(weights(runs, name_of("lion", layout)), plain["lion"][0], without=NO_GRADIENT)
    print(layout, int((found > 1e-6).sum()), found.numel())
    assert (found > 1e-6).sum() < 1e-4 * found.numel()
    assert found.max() <= 2e-4 * NUM_STEPS
    assert seen(runs, name_of("lion", layout))["losses"] == pytest.approx(plain["lion"][1], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_on_whole_parameters_is_that_of_bitsandbytes(optimizer: str, runs: Path, plain: Any) -> None:
    """A gradient that differs in its last bit may fall to the next of 256 levels, so single weights may differ."""
    found = differences(weights(runs, f"{optimizer}-0"), plain["adamw_8bit"][0])
    print(optimizer, float(found.mean()), float(found.max()))
    assert found.mean() < 1e-5
    assert seen(runs, f"{optimizer}-0")["losses"] == pytest.approx(plain["adamw_8bit"][1], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS["adamw_8bit"])
def test_8_bit_adamw_follows_adamw_however_its_blocks_are_cut(layout: tuple[int, bool], runs: Path, plain: Any) -> None:
    steps = seen(runs, name_of("adamw_8bit", layout))
    assert steps["losses"] == pytest.approx(plain["adamw"][1], rel=1e-3)
    assert steps["bytes"][-1] < 0.6 * seen(runs, name_of("adamw", layout))["bytes"][-1]


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_optimizers_of_whole_matrices_are_torchs(optimizer: str, runs: Path, plain: Any) -> None:
    """Muon orthogonalises in bfloat16, which turns the last bit of a gradient into 2^-8 of an update (up to 2.3 x the
    rate here). On equal gradients it is torch's bit for bit: tests/unit/test_optimizers.py."""
    tolerance = 1e-6 if optimizer == "adafactor" else 2.3 * PEAK * 2**-8 * NUM_STEPS
    found = differences(weights(runs, f"{optimizer}-0"), plain[optimizer][0])
    print(optimizer, float(found.mean()), float(found.max()))
    assert found.max() < tolerance
    assert seen(runs, f"{optimizer}-0")["losses"] == pytest.approx(plain[optimizer][1], rel=1e-5)


def test_deepspeeds_fused_adam_in_bfloat16_has_float32_masters(runs: Path, plain: Any) -> None:
    assert seen(runs, "bf16-fused")["losses"] == pytest.approx(plain["adamw"][1], rel=5e-4)


@pytest.mark.parametrize("name", [case.name for case in wanted_cases() if case.name.endswith("-resumed")])
def test_a_run_that_is_saved_and_built_anew_ends_bit_for_bit_the_same(name: str, runs: Path) -> None:
    """8-bit states are stored in float32; loading gives the same codes and scales."""
    assert same_state(checkpoint(runs, name), checkpoint(runs, name.removesuffix("-resumed")))
    assert seen(runs, name)["losses"] == seen(runs, name.removesuffix("-resumed"))["losses"]


@pytest.mark.parametrize("name", [case.name for case in wanted_cases() if case.reopen_at or case.freeze == PHASES])
def test_a_closed_engine_leaves_nothing_behind(name: str, runs: Path) -> None:
    assert seen(runs, name)["leaked"] == []


def test_8_bit_states_move_to_another_layout(runs: Path) -> None:
    """From flat buffers of stage 2 to shards of stage 3: other blocks, so within the error of 8 bits."""
    ours, theirs = (CheckpointTensors(checkpoint(runs, name)) for name in ("8bit-moved", "adamw_8bit-2"))
    assert ours.names() == theirs.names()
    assert set(ours.num_updates.values()) == {NUM_STEPS}
    for name in ours.names():
        assert torch.equal(ours.whole(name), theirs.whole(name))
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = theirs.whole(name, kind)
            error = float((ours.whole(name, kind) - moment).norm() / moment.norm().clamp_min(1e-30))
            assert error < 0.02, (name, kind)


def test_trained_values_are_not_lost_to_a_new_rule(runs: Path) -> None:
    """A parameter that is frozen has no master, so no later checkpoint would hold what it has learnt."""
    error = seen(runs, "frozen-later")["error"]
    assert "holds 3 trained parameters that are frozen now, such as model.decoder.embed_positions.weight" in error


def plain_phases() -> tuple[dict[str, Tensor], list[float]]:
    """Each phase's new parameters are groups of their own, whose AdamW begins when they do."""
    model, losses = make_model(), []
    names = dict(model.named_parameters())
    places, embeddings = layer_places(names), embedding_names(model)

    def starts_after(name: str) -> float:
        if name in embeddings:
            return math.inf
        stack, number = places.get(name, ("", -1))
        return 3 if stack == "encoder" else 6 if (stack, number) == ("decoder", 0) else 0

    optimizers: list[Any] = []
    for parameter in names.values():
        parameter.requires_grad_(False)
    for step in range(NUM_STEPS):
        new = [p for name, p in names.items() if starts_after(name) == step]
        for parameter in new:
            parameter.requires_grad_(True)
        if new:
            decaying, others = [p for p in new if p.ndim > 1], [p for p in new if p.ndim < 2]
            optimizers.append(torch.optim.AdamW(decaying, weight_decay=0.1, **ADAM))
            optimizers.append(torch.optim.AdamW(others, weight_decay=0.0, **ADAM))
        losses.append(plain_step(model, optimizers, step, PEAK))
    return {name: p.detach() for name, p in names.items()}, losses


@pytest.mark.parametrize("stage", range(4))
def test_thawed_parameters_begin_their_own_adam(stage: int, runs: Path) -> None:
    theirs, losses = plain_phases()
    ours = weights(runs, f"phases-{stage}")
    found = differences(ours, {name: theirs[name] for name in ours}, without=NO_GRADIENT)
    print(stage, float(found.max()))
    assert found.max() < 1e-6
    assert seen(runs, f"phases-{stage}")["losses"] == pytest.approx(losses, rel=1e-6)
    counts = CheckpointTensors(checkpoint(runs, f"phases-{stage}")).num_updates
    assert {counts[name] for name in counts if ".encoder.layers." in name} == {NUM_STEPS - 3}
    assert {counts[name] for name in counts if ".decoder.layers.0." in name} == {NUM_STEPS - 6}
    assert {counts[name] for name in counts if ".decoder.layers.1." in name} == {NUM_STEPS}


@pytest.mark.parametrize("name", [f"phases-{stage}{end}" for stage in range(4) for end in ("", "-resumed")])
def test_a_frozen_parameter_never_changes(name: str, runs: Path) -> None:
    model = make_model()
    digests = seen(runs, name)["frozen"]
    assert embedding_names(model).isdisjoint(weights(runs, name))
    assert len(set(digests)) == 3  # one for each phase
    for step, part in ((3, "encoder.layers."), (6, "decoder.layers.0."), (NUM_STEPS, "embed_positions")):
        names = set(CheckpointTensors(checkpoint(runs, name, step)).names())
        assert not [one for one in names if part in one]
        assert digests[step - 1] == digest({n: p for n, p in model.named_parameters() if n not in names})


@pytest.mark.parametrize("stage", range(4))
def test_early_phases_take_less_memory(stage: int, runs: Path) -> None:
    """Masters and two moments, 12 bytes a trained parameter. (At stage 0 the weight is its own master.)"""
    sizes = seen(runs, f"phases-{stage}")["bytes"]
    assert sizes[0] == sizes[2] < 0.6 * sizes[3]
    assert sizes[5] < sizes[6] == sizes[-1] < seen(runs, f"adamw-{stage}")["bytes"][-1]
    trained = sum(weight.numel() for weight in weights(runs, f"phases-{stage}", 3).values())
    assert sizes[0] == pytest.approx(12 * trained / (2 if stage else 1), rel=0.02)
    if (gradients := seen(runs, f"phases-{stage}")["gradients"])[0] is not None:
        assert gradients[0] == trained
        assert gradients[0] == gradients[2] < gradients[3] == gradients[5] < gradients[6]
