"""Learning rate as a pure function of the step number."""

from __future__ import annotations

import math

from harness.config.schema import ScheduleConfig


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (the first is 1).

    Warm-up rises linearly to `peak` at step `warmup_steps`. `inverse_sqrt` follows Vaswani et al. (2017),
    section 5.3, scaled so that it meets `peak` at the end of warm-up.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / step)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shapes: dict[str, float] = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "polynomial": (1.0 - progress) ** schedule.power,
    }
    return schedule.min_lr + (peak - schedule.min_lr) * shapes[schedule.name]
