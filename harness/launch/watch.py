"""The heartbeats of the ranks on this machine: who is too late, and where it stands."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.config.launch_schema import LaunchConfig
from harness.io import heartbeat
from harness.io.atomic import write_json
from harness.io.heartbeat import Pulse
from harness.launch.environment import configured_variables

PULSES_FILE = "pulses.json"
_PULSES_EVERY_S = 5.0
_SHORTEST_PAUSE_S = 2.0


class Watch:
    """Looks at the heartbeat files of ranks, which lie in a private directory of this machine."""

    def __init__(self, directory: Path, launch: LaunchConfig) -> None:
        self._directory, self._launch = directory, launch
        self._host = socket.gethostname()
        self._pause_s = max(_SHORTEST_PAUSE_S, launch.heartbeat_timeout_s / 2)
        self._looked_at = self._awake_since = time.monotonic()
        self._cells: dict[int, heartbeat.Cells] = {}
        self._pulses: dict[int, Pulse] = {}

    def begin(self, rank: int) -> dict[str, str]:
        """A heartbeat file for a rank that is about to be started; gives the variable that names it."""
        path = self._file(rank)
        self._cells[rank] = heartbeat.create(path)
        return {heartbeat.VARIABLE: str(path)}

    def look(self, ranks: Iterable[int]) -> None:
        """Read the pulses of the running ranks, about once a second. After a pause this process has been stopped, and
        perhaps the ranks with it: that time is not held against them."""
        now = time.monotonic()
        if now - self._looked_at > self._pause_s:
            self._awake_since = now
        self._looked_at = now
        self._pulses = {rank: self._read(rank, now - self._awake_since) for rank in ranks}

    def late(self) -> tuple[int, str] | None:
        """The rank that is too late, and what is wrong: the first that fell silent (importing packages may hold up all
        threads), else the first that got stuck, for which the others wait."""
        limits = self._launch.timeouts_s
        silent = [
            (pulse.alive_age_s or 0.0, rank)
            for rank, pulse in self._pulses.items()
            if (pulse.alive_age_s or 0.0) > self._launch.heartbeat_timeout_s and pulse.phase != "meet"
        ]
        stuck = [
            (pulse.phase_age_s, rank)
            for rank, pulse in self._pulses.items()
            if pulse.phase_age_s > (getattr(limits, pulse.phase) or float("inf"))
        ]
        if silent:
            age_s, rank = max(silent)
            return rank, f"{self._where(rank)} has given no sign of life for {age_s:.0f} s"
        if stuck:
            age_s, rank = max(stuck)
            phase = self._pulses[rank].phase
            lock = self._compiler_lock() if phase in ("prepare", "load") else ""
            return rank, f"{self._where(rank)} has got no further for {age_s:.0f} s (launch.timeouts_s.{phase}){lock}"
        return None

    def shown(self) -> dict[str, dict[str, Any]]:
        """The pulses by rank, as pulses.json has them; `age_s` counts from the last sign of life."""
        return {
            str(rank): {
                "host": self._host,
                "phase": pulse.phase,
                "step": pulse.step,
                "age_s": round(pulse.phase_age_s if pulse.alive_age_s is None else pulse.alive_age_s, 3),
                "phase_age_s": round(pulse.phase_age_s, 3),
            }
            for rank, pulse in self._pulses.items()
        }

    def answers(self, rank: int) -> bool:
        """Whether the rank answers SIGQUIT with its stacks: before it has come so far it would die of it."""
        return heartbeat.read(self._cells[rank]).alive_age_s is not None

    def stack(self, rank: int) -> str:
        """What the rank has answered to SIGQUIT."""
        path = heartbeat.stack_file(self._file(rank))
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _read(self, rank: int, longest_s: float) -> Pulse:
        pulse = heartbeat.read(self._cells[rank])
        alive_age_s = pulse.alive_age_s if pulse.alive_age_s is None else min(pulse.alive_age_s, longest_s)
        return pulse._replace(alive_age_s=alive_age_s, phase_age_s=min(pulse.phase_age_s, longest_s))

    def _where(self, rank: int) -> str:
        phase, step = self._pulses[rank].phase, self._pulses[rank].step
        return f"rank {rank} on {self._host}, in phase {phase}" + (f" after step {step}" if step else "") + ","

    def _file(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.heartbeat"

    def _compiler_lock(self) -> str:
        """torch builds extensions under a lock file, and waits for ever, in silence, for one that a killed process has
        left."""
        chosen = (os.environ | configured_variables(self._launch)).get("TORCH_EXTENSIONS_DIR")
        root = Path(chosen) if chosen else Path.home() / ".cache" / "torch_extensions"
        locks = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
        return f"; a compiler's lock lies in {locks[0]}: remove it if nothing compiles there" if locks else ""


class PulsesFile:
    """Pulses of all ranks for `harness status`; that they cannot be written holds nothing up."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._due = run_dir / PULSES_FILE, 0.0

    def update(self, pulses: Mapping[str, Any]) -> None:
        """Write them, unless that was done just now."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _PULSES_EVERY_S
        with suppress(OSError):
            write_json(self._path, {"time": time.time(), "ranks": pulses})
