"""``python -m harness.engine.build_ops OP ...``: compile DeepSpeed's ops before ranks need them.

One process builds; a rank that compiles while others wait looks like a hang, and one killed meanwhile leaves a lock.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError
from harness.io.accelerator import accelerator


def build_ops(names: Sequence[str]) -> None:
    """Compile and load ops by name; what is compiled already is only loaded. Raises HarnessError if that fails."""
    if not names:
        return
    use_our_ninja()
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder

    builders = {"cpu_adam": CPUAdamBuilder, "fused_adam": FusedAdamBuilder, "async_io": AsyncIOBuilder}
    for name in names:
        try:
            builders[name]().load(verbose=False)
        except Exception as error:  # of the compiler, of torch, or of DeepSpeed's own checks
            reason = str(error).strip().rpartition("\n")[2]
            what = f"DeepSpeed's {name} cannot be compiled: {reason}"
            raise HarnessError(what, hint="`harness doctor` tells what is missing") from error


def use_our_ninja() -> None:
    """Put the programs of our environment first in PATH: another version of ninja would compile everything anew."""
    ours = str(Path(sys.executable).parent)
    others = [path for path in os.environ.get("PATH", os.defpath).split(os.pathsep) if path != ours]
    os.environ["PATH"] = os.pathsep.join([ours, *others])


if __name__ == "__main__":
    try:
        build_ops(sys.argv[1:])
    except HarnessError as error:
        sys.exit(error.what)
