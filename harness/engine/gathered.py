"""Under ZeRO-3, a full copy of the weights on every rank for a while, if all of them have the memory for it.

Then a rank computes by itself what it likes: DeepSpeed's hooks, which gather and release each layer and with that keep
ranks in step, are taken off for the time. trl does the same to generate (`remove_hooks` in trl/models/utils.py).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.engine.measure import free_memory_bytes
from harness.engine.processes import Processes

SHARE_OF_FREE_MEMORY = 0.5  # what a copy may take; the rest is for keys, values and logits


@contextmanager
def whole_weights(engine: Any, processes: Processes) -> Iterator[bool]:
    """True if within every rank has all weights of `engine.module`, which must then not be changed; else ranks have to
    move in step. A collective; leaving it is not, so a rank may leave by an error."""
    if int(engine.zero_optimization_stage()) != 3:
        yield True
        return
    offload = engine.optimizer.parameter_offload
    if not _fits_everywhere(offload, processes):
        yield False
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    offload.partition_all_parameters()  # a forward pass may have left some gathered, or on their way
    with GatheredParameters(list(engine.module.parameters())), _without_hooks(offload):
        yield True


def _fits_everywhere(offload: Any, processes: Processes) -> bool:
    """Not with weights on NVMe, which DeepSpeed reads through a few buffers; a collective."""
    parameters = list(offload.module.parameters())
    num_bytes = sum(parameter.ds_numel * parameter.ds_tensor.element_size() for parameter in parameters)
    host = socket.gethostname()
    sharers = processes.gather(host).count(host) if processes.device.type == "cpu" else 1
    free = free_memory_bytes(processes.device) / sharers
    fits = num_bytes <= SHARE_OF_FREE_MEMORY * free and offload.offload_device != "nvme"
    return processes.sum([fits]) == [processes.world_size]


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """Within, DeepSpeed does not see the forward passes; its hooks come back where they were."""
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    tables = list({id(table): table for table in (handle.hooks_dict_ref() for handle in handles)}.values())
    before = [dict(table) for table in tables]
    for handle in handles:
        handle.remove()
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)
