"""The final DeepSpeed configuration of a run."""

from __future__ import annotations

from typing import Any

from harness.config.deepspeed import merged_document, owned_values, zero_stage
from harness.config.schema import RunConfig


def final_deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The preset or file with its overrides, and what the run file decides, as ``deepspeed.initialize`` gets it.

    It has no ``optimizer`` and no ``scheduler``: both are built by the engine and the loop. Batch sizes are 1 because
    the loop cuts global batches itself and tells DeepSpeed where a step ends. bfloat16 gradients of micro-batches are
    added up in float32 unless the file says otherwise; DeepSpeed cannot do that without ZeRO.
    """
    document = merged_document(config.deepspeed)
    if config.model.dtype == "bfloat16" and zero_stage(document) > 0:
        document["data_types"] = {"grad_accum_dtype": "fp32", **document.get("data_types", {})}
    return {**document, **owned_values(config), "train_batch_size": world_size}
