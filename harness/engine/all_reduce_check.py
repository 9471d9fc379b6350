"""``python -m harness.engine.all_reduce_check STORE RANK WORLD_SIZE``: one sum over ranks, for ``harness doctor``."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> int:
    path, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = dist.FileStore(path, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    value = torch.tensor([float(rank + 1)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return 0 if value.item() == world_size * (world_size + 1) / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
