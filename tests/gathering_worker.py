"""tests/worker.py for runs under ZeRO-3 whose name says how they evaluate.

    python tests/gathering_worker.py STORE RANK WORLD_SIZE RUN.yaml ...

`lockstep`: as if no rank had the memory for all weights. `fails`: the second evaluation ends with an error within, and
training goes on. Each run leaves has-all.json: whether its evaluations had all weights, and for how many modules
DeepSpeed fetched them meanwhile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.engine import gathered
from harness.training import loop, session, validate
from tests import worker

whole_weights, open_session, evaluate_validation = (
    gathered.whole_weights, session.open_session, validate.evaluate_validation,
)  # fmt: skip


class Broken(Exception):
    """An evaluation that does not come to its end."""


def opened(*arguments: Any) -> session.Session:
    run = open_session(*arguments)
    name, seen = run.config.name, []
    gathered.SHARE_OF_FREE_MEMORY = 0.0 if "lockstep" in name else 0.5

    @contextmanager
    def watched(*parts: Any) -> Iterator[bool]:
        offload = getattr(run.engine.optimizer, "parameter_offload", None)
        fetched = []
        if offload is not None:
            own = type(offload).pre_sub_module_forward_function
            offload.pre_sub_module_forward_function = lambda module: (fetched.append(1), own(offload, module))
        try:
            with whole_weights(*parts) as has_all:
                if "fails" in name and len(seen) == 1:
                    seen.append([has_all, 0])
                    raise Broken
                yield has_all
                seen.append([has_all, len(fetched)])
        finally:
            (run.run_dir / "has-all.json").write_text(json.dumps(seen))
            if offload is not None:
                del offload.pre_sub_module_forward_function

    validate.whole_weights = watched
    return run


def evaluated(run: session.Session) -> bool:
    try:
        return evaluate_validation(run)
    except Broken:
        run.progress.evaluated_step = run.progress.step
        return False


if __name__ == "__main__":
    worker.open_session = opened
    loop.evaluate_validation = evaluated
    worker.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
