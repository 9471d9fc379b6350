"""The process group: how ranks find each other and what they agree on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.errors import HarnessError, Interrupted

PREPARATION_TIMEOUT = timedelta(days=2)  # tokenising a large corpus may take hours; a dead rank is noticed elsewhere


@dataclass(frozen=True)
class Processes:
    """This process among the ranks of the run. Every method is a collective: all ranks call it or none."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    store: dist.Store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first_rank_prepares(self, prepare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `prepare` on rank 0 before the process group exists, and give its JSON answer to every rank.

        No collective waits meanwhile, so it may take as long as it likes. When it fails, rank 0 raises its error and
        the others raise one that names rank 0 (Interrupted if that was it).
        """
        if not self.is_first:
            self.store.wait(["prepared"], PREPARATION_TIMEOUT)
            answer = json.loads(self.store.get("prepared"))
            if "error" in answer:
                kind = Interrupted if answer["is_interrupted"] else HarnessError
                raise kind(f"rank 0 could not prepare the run: {answer['error']}")
            return dict(answer["value"])
        try:
            value = prepare()
        except BaseException as error:
            answer = {"error": str(error), "is_interrupted": isinstance(error, Interrupted)}
            self.store.set("prepared", json.dumps(answer))
            raise
        self.store.set("prepared", json.dumps({"value": value}))
        return value

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(total.tolist())

    def gather(self, value: Any) -> list[Any]:
        """One JSON value of each rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([payload.numel()], dtype=torch.int64, device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length)
        longest = int(torch.stack(lengths).max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: payload.numel()] = payload
        pieces = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(pieces, padded)
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(pieces, lengths, strict=True)]

    def barrier(self) -> None:
        if self.world_size > 1:
            self.sum([0.0])


def find_store(*, rank: int, world_size: int, store_path: Path | None) -> dist.Store:
    """The key-value store of this run: a private file on one machine, else the launcher's MASTER_ADDR:MASTER_PORT."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    if store_path is not None:
        return dist.FileStore(str(store_path), world_size)
    if world_size == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=world_size))
    return dist.PrefixStore("harness", store)


def find_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join(processes: Processes, *, timeout_s: float) -> None:
    """Form the process group (NCCL on GPUs, gloo on CPUs) and make DeepSpeed use it.

    DeepSpeed's shared-memory all-reduce for CPUs is left out: it compiles for a minute at the first start and only
    serves tensor-parallel inference.
    """
    os.environ.setdefault("LOCAL_RANK", str(processes.local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)  # else DeepSpeed guesses, and says so at length
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group(
        "nccl" if processes.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", processes.store),
        rank=processes.rank,
        world_size=processes.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=processes.device if processes.device.type == "cuda" else None,
    )
    deepspeed.init_distributed(verbose=False)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
