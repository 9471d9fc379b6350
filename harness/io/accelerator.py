"""Which accelerator this machine has, found out without importing torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Accelerator = Literal["cpu", "cuda"]


def accelerator() -> Accelerator:
    """``HARNESS_ACCELERATOR`` or ``DS_ACCELERATOR`` if it says cpu or cuda, else cuda if there is an NVIDIA device."""
    for variable in ("HARNESS_ACCELERATOR", "DS_ACCELERATOR"):
        name = os.environ.get(variable, "").lower()
        if name == "cpu":
            return "cpu"
        if name == "cuda":
            return "cuda"
    return "cuda" if nvidia_devices() else "cpu"


def num_devices() -> int:
    """Devices a run can use here: visible CUDA devices, or 1 on a CPU (the user says how many processes to start)."""
    if accelerator() == "cpu":
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return max(1, len(nvidia_devices()))


def nvidia_devices() -> list[Path]:
    """The device files /dev/nvidia0, /dev/nvidia1, ..."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def host_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
