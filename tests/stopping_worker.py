"""tests/worker.py for runs that are stopped on their way and show what the engine's model says at their end.

    python tests/stopping_worker.py STORE RANK WORLD_SIZE RUN.yaml ...

A run whose name ends in `-stopped` is asked to stop in step STOP_STEP the first time that it is made: name its file
twice. A run that comes to its end leaves RUN_DIR/last.pt: inputs of the model, and its logits.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from harness.engine.build import close_engine
from harness.errors import Interrupted
from harness.training import finish, loop, session
from tests import worker

STOP_STEP = 3


def open_session(*arguments: Any) -> session.Session:
    opened = session.open_session(*arguments)
    if opened.config.name.endswith("-stopped") and opened.progress.step == 0:
        opened.stop.wanted = lambda: opened.progress.step + 1 >= STOP_STEP  # type: ignore[method-assign]
    return opened


def train(opened: session.Session) -> None:
    try:
        loop.train(opened)
    except Interrupted:
        close_engine(opened.engine)
        raise


@torch.no_grad()
def finish_and_show(opened: session.Session) -> None:
    finish.finish(opened)
    model = opened.engine.module.eval()
    inputs = finish.fixed_inputs(opened.task, model.config)
    logits = model(**inputs).logits
    if opened.processes.is_first:
        torch.save({"inputs": inputs, "logits": logits}, opened.run_dir / "last.pt")
    close_engine(opened.engine)


if __name__ == "__main__":
    worker.open_session, worker.train, worker.finish = open_session, train, finish_and_show  # type: ignore[attr-defined]
    worker.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
