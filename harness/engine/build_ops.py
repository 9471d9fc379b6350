"""``python -m harness.engine.build_ops OP ...``: compile DeepSpeed's ops before ranks need them.

One process builds; a rank that compiles while others wait looks like a hang, and one killed meanwhile leaves a lock.
"""

from __future__ import annotations

import sys

from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder

BUILDERS = {"cpu_adam": CPUAdamBuilder, "fused_adam": FusedAdamBuilder, "async_io": AsyncIOBuilder}


def main() -> int:
    for name in sys.argv[1:]:
        BUILDERS[name]().load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
