"""What a rank can say about its memory and about the size of an update."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.fragments import base_optimizer, holders, is_replicated
from harness.engine.processes import Processes


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held: on the accelerator if there is one, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes(device: torch.device) -> int:
    """What could be allocated now: on the accelerator if there is one, else in this machine's main memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def optimizer_bytes(engine: Any) -> int:
    """What this rank's masters and moments take, as they are stored."""
    state = base_optimizer(engine).state
    found = 0
    for holder in holders(engine):
        parts = (part for part in state.get(holder.tensor, {}).values() if torch.is_tensor(part))
        found += sum(part.nbytes for part in (holder.tensor, *parts))
    return found


def copy_masters(engine: Any) -> list[Tensor]:
    """Copies of this rank's master weights, to be compared after a step."""
    copies = []
    for holder in holders(engine):
        with holder.resident(False):
            copies.append(holder.tensor.detach().clone())
    return copies


def update_to_weight_ratio(engine: Any, before: list[Tensor], processes: Processes) -> float:
    """Norm of the step's update over norm of the weights, all parameters together; a collective."""
    update, weight = 0.0, 0.0
    for holder, old in zip(holders(engine), before, strict=True):
        with holder.resident(False):
            update += float((holder.tensor.detach() - old).square().sum(dtype=torch.float64))
        weight += float(old.square().sum(dtype=torch.float64))
    if not is_replicated(engine):
        update, weight = processes.sum([update, weight])
    return math.sqrt(update / weight) if weight else 0.0
