"""The learning rate of every step against the schedulers of transformers and torch.

Their value of index n, the rate after n scheduler steps, is ours of step n (ours count from 1, so that the first step
of a warm-up is not lost to a rate of 0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, PolynomialLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from harness.config.schema import ScheduleConfig
from harness.plan.schedule import learning_rate

PEAK, TOTAL, END = 3e-4, 50, 1e-5
Theirs = Callable[[torch.optim.Optimizer], LRScheduler]


def ours(total_steps: int = TOTAL, **schedule: Any) -> list[float]:
    settings = ScheduleConfig(steps=total_steps, **schedule)
    steps = range(1, total_steps + 1)
    return [learning_rate(step, peak=PEAK, total_steps=total_steps, schedule=settings) for step in steps]


def theirs(make: Theirs, num_steps: int = TOTAL) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(num_steps):
        optimizer.step()
        scheduler.step()
        rates.append(float(scheduler.get_last_lr()[0]))
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL - 1])
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ({"name": "constant"}, get_constant_schedule_with_warmup),
        ({"name": "linear"}, partial(get_linear_schedule_with_warmup, num_training_steps=TOTAL)),
        ({"name": "cosine"}, partial(get_cosine_schedule_with_warmup, num_training_steps=TOTAL)),
        (
            {"name": "cosine", "min_lr": END},
            partial(get_cosine_with_min_lr_schedule_with_warmup, num_training_steps=TOTAL, min_lr=END),
        ),
        (
            {"name": "polynomial"},
            partial(get_polynomial_decay_schedule_with_warmup, num_training_steps=TOTAL, lr_end=0.0),
        ),
        (
            {"name": "polynomial", "power": 2.5, "min_lr": END},
            partial(get_polynomial_decay_schedule_with_warmup, num_training_steps=TOTAL, lr_end=END, power=2.5),
        ),
        (
            {"name": "linear", "min_lr": END},
            partial(get_polynomial_decay_schedule_with_warmup, num_training_steps=TOTAL, lr_end=END, power=1.0),
        ),
    ],
)
def test_rates_are_those_of_transformers(schedule: dict[str, Any], make: Any, warmup: int) -> None:
    expected = theirs(lambda optimizer: make(optimizer, num_warmup_steps=warmup))
    assert ours(warmup_steps=warmup, **schedule) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("warmup", [1, 7, TOTAL])
def test_inverse_square_root_is_that_of_transformers(warmup: int) -> None:
    expected = theirs(lambda optimizer: get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup))
    assert ours(name="inverse_sqrt", warmup_steps=warmup) == pytest.approx(expected, rel=1e-12)


def test_inverse_square_root_without_warmup_starts_at_the_peak() -> None:
    assert ours(name="inverse_sqrt") == pytest.approx([PEAK / step**0.5 for step in range(1, TOTAL + 1)], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ({"name": "cosine", "min_lr": END}, partial(CosineAnnealingLR, T_max=TOTAL, eta_min=END)),
        ({"name": "polynomial", "power": 2.0}, partial(PolynomialLR, total_iters=TOTAL, power=2.0)),
    ],
)
def test_rates_without_warmup_are_those_of_torch(schedule: dict[str, Any], make: Theirs) -> None:
    # torch computes each rate from the one before, so rounding errors add up.
    assert ours(**schedule) == pytest.approx(theirs(make), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_the_published_mbart_recipe_rises_to_its_peak_and_falls_to_the_end(name: str) -> None:
    """Warm-up 2,500 of 40,000 steps: half the peak at 1,250, the peak at 2,500, half of it half-way down."""
    settings = ScheduleConfig.model_validate({"name": name, "warmup_steps": 2500, "steps": 40000})
    rate = partial(learning_rate, peak=3e-5, total_steps=40000, schedule=settings)
    assert [rate(step) for step in (1, 1250, 2500, 21250, 40000)] == pytest.approx(
        [3e-5 / 2500, 1.5e-5, 3e-5, 1.5e-5, 0.0], rel=1e-12, abs=1e-18
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_the_rate_stays_at_its_end_after_the_last_step(name: str) -> None:
    settings = ScheduleConfig.model_validate({"name": name, "warmup_steps": 3, "steps": 10, "min_lr": END})
    late = [learning_rate(step, peak=PEAK, total_steps=10, schedule=settings) for step in (10, 11, 1000)]
    assert late == pytest.approx([END] * 3, rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "polynomial", "inverse_sqrt"])
def test_a_warmup_as_long_as_the_run_ends_at_the_peak(name: str) -> None:
    assert ours(name=name, warmup_steps=TOTAL) == pytest.approx([PEAK * step / TOTAL for step in range(1, TOTAL + 1)])
