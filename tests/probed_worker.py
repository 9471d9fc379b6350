"""tests/worker.py with probes on every run: digests of the weights, counts of forward passes, injected faults.

    python tests/probed_worker.py STORE RANK WORLD_SIZE RUN.yaml ...

A run whose name contains `nan` gets, at step NAN_STEP, a NaN gradient on rank 1 alone; its loss stays finite.
A run whose name contains `stopped` is asked to stop at step STOP_STEP the first time it is made.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from harness.engine.build import apply_gradients
from harness.training import loop, session
from tests import worker

NAN_STEP, STOP_STEP = 3, 5


def probed_session(*arguments: Any) -> session.Session:
    opened = session.open_session(*arguments)
    Probe(opened)
    return opened


def save_only(opened: session.Session) -> None:
    """In place of `finish`: no export, no test scores."""
    if opened.progress.step not in opened.store.steps():
        session.save(opened)


class Probe:
    """Writes probe-RANK.json into the run directory, anew after every step."""

    def __init__(self, opened: session.Session) -> None:
        self.session = opened
        self.first_step = opened.progress.step
        self.seen: dict[str, Any] = {"initial": self._digest(), "num_forward": {}, "steps": {}}
        network = opened.engine.module
        network.register_forward_hook(self._on_forward)
        network.get_decoder().layers[-1].fc2.register_forward_hook(self._on_output)
        loop.apply_gradients = self._apply

    @property
    def step(self) -> int:
        return self.session.progress.step + 1

    def _on_forward(self, module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            counts = self.seen["num_forward"]
            counts[self.step] = counts.get(self.step, 0) + 1
        if "stopped" in self.session.config.name and self.first_step == 0 and self.step == STOP_STEP:
            self.session.stop.reason = "test"

    def _on_output(self, module: Any, inputs: Any, output: Tensor) -> None:
        wanted = "nan" in self.session.config.name and self.session.processes.rank == 1 and self.step == NAN_STEP
        if wanted and module.training:
            output.register_hook(lambda gradient: gradient * float("nan"))

    def _apply(self, engine: Any, learning_rate: float) -> Any:
        outcome = apply_gradients(engine, learning_rate)
        self.seen["steps"][self.step] = {
            "applied": outcome.applied,
            "grad_norm": outcome.grad_norm,
            "lr": [group["lr"] for group in engine.optimizer.param_groups],
            "clip_norm": engine.gradient_clipping(),
            "weights": self._digest(),
        }
        path = self.session.run_dir / f"probe-{self.session.processes.rank}.json"
        path.write_text(json.dumps(self.seen))
        return outcome

    def _digest(self) -> str:
        """Hash over the weights that this rank's next forward pass will use."""
        found = hashlib.sha256()
        for name, parameter in self.session.engine.module.named_parameters():
            with _gathered(parameter):
                found.update(name.encode() + parameter.detach().float().numpy().tobytes())
        return found.hexdigest()


def _gathered(parameter: torch.nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


if __name__ == "__main__":
    worker.open_session, worker.finish = probed_session, save_only  # type: ignore[attr-defined]
    worker.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
