"""Which preset fits a device's memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.config.deepspeed import preset_names
from harness.config.rules import stage_problems
from harness.config.schema import DeepSpeedConfig, RunConfig
from harness.errors import ConfigError
from harness.plan.deepspeed import final_deepspeed_config
from harness.plan.held import Held
from harness.plan.zero import model_states

# From the fastest to the most frugal: each step down costs communication or transfers.
_PREFERENCE = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
_ALONE = ("zero0", "zero2_offload", "zero3_offload", "zero3_nvme")

# Share of the device left to activations, communication buffers and fragmentation.
_ROOM_FOR_ACTIVATIONS = 0.3
_LOGITS_COPIES = 2  # the logits and their gradient

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Candidate:
    """Model states of one preset, in bytes per rank on the device and on the host."""

    preset: str
    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    fits: bool | None


def candidates(
    config: RunConfig, held: Held, *, world_size: int, device_bytes: int | None, logits_bytes: int, on_cpu: bool
) -> list[Candidate]:
    """Every preset that the run can take on ``world_size`` ranks, the fastest first; ``fits`` is None without a memory
    size.

    A preset fits if its model states, the logits of one micro-batch and their gradient leave 30 % of the device free.
    """
    names = [name for name in (_PREFERENCE if world_size > 1 else _ALONE) if name in preset_names()]
    if on_cpu:  # the host's memory is the device's: nothing is won by offloading to it
        names = [name for name in names if not name.endswith("_offload")]
    runs = [config.model_copy(update={"deepspeed": DeepSpeedConfig(preset=name)}) for name in names]
    return [
        _candidate(run, held, world_size, device_bytes, logits_bytes) for run in runs if not any(stage_problems(run))
    ]


def _candidate(
    config: RunConfig, held: Held, world_size: int, device_bytes: int | None, logits_bytes: int
) -> Candidate:
    memory = model_states(
        held,
        deepspeed=final_deepspeed_config(config, world_size),
        dtype=config.model.dtype,
        optimizer=config.optimizer.name,
        world_size=world_size,
    )
    device, host, nvme = (sum(memory[place].values()) for place in ("device", "host", "nvme"))
    fits = None
    if device_bytes is not None:
        fits = device + _LOGITS_COPIES * logits_bytes <= (1 - _ROOM_FOR_ACTIVATIONS) * device_bytes
    return Candidate(config.deepspeed.preset, device, host, nvme, fits)


def parse_bytes(text: str) -> int:
    """``80GiB``, ``24G``, ``512 MB`` or a plain number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"'{text}' is not a size in bytes", hint="write it like 80GiB or 24GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def shown_bytes(num_bytes: float) -> str:
    """Bytes with a binary unit and three significant digits: ``2.27 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
