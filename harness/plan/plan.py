"""The plan of a run: everything the ranks need to know, worked out once without torch or a GPU.

It is written to ``<run_dir>/plan.json``; the ranks read only that file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.config.model_rules import PROMPT_METHODS
from harness.config.schema import RunConfig
from harness.errors import ConfigError, DataError
from harness.plan.deepspeed import final_deepspeed_config
from harness.plan.held import FLOAT32_BYTES, WEIGHT_BYTES, held_weights
from harness.plan.parameters import model_json, model_tensors, position_limit, trained_length
from harness.plan.tensors import ModelJson, Tensors, num_parameters
from harness.plan.zero import Memory, model_states, offload_device, state_bytes


@dataclass(frozen=True)
class Batches:
    """Batch arithmetic. ``least_micro_steps``: per optimizer step, if no micro-batch had padding or room to spare."""

    tokens_per_step: int
    max_tokens_per_device: int
    least_micro_steps: int
    steps: int | None
    epochs: float | None
    total_tokens: int | None


@dataclass(frozen=True)
class Plan:
    """A checked run. The sizes are None if the model's config.json is not here or its family's shapes are not known.

    ``num_parameters``: of the model; ``num_trained``: those with gradients, an adapter's among them. ``warnings``: what
    is allowed and may not be meant. ``logits_bytes``: None for a classifier too.
    """

    config: RunConfig
    run_dir: str
    world_size: int
    deepspeed: dict[str, Any]
    batches: Batches
    num_parameters: int | None = None
    num_trained: int | None = None
    memory: Memory | None = None
    logits_bytes: int | None = None
    checkpoint_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``plan.json``."""
        plain = {name: value for name, value in vars(self).items() if name not in ("config", "batches")}
        return {"config": self.config.model_dump(mode="json"), "batches": asdict(self.batches), **plain}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Plan:
        """The inverse of ``to_json``. Raises DataError if ``content`` is not a plan."""
        try:
            config = RunConfig.model_validate(content["config"])
            batches = Batches(**content["batches"])
            return cls(**{**content, "config": config, "batches": batches})
        except (KeyError, TypeError, ValidationError) as error:
            raise DataError("not a plan of this version of harness", where="plan.json") from error


def make_plan(config: RunConfig, *, world_size: int) -> Plan:
    """Work out a run on ``world_size`` ranks. Raises ConfigError if the model cannot take inputs as long as asked."""
    deepspeed = final_deepspeed_config(config, world_size)
    model = model_json(config.model.path or config.model.config or "")
    sizes: dict[str, Any] = {}
    if model is not None:
        sizes["warnings"] = _check_positions(config, model)
        tensors = model_tensors(model, config.task, config.classification)
        if tensors is not None:
            _fit_nvme_buffers(deepspeed, tensors, world_size)
            sizes |= _sizes(config, model, tensors, deepspeed, world_size)
    return Plan(
        config=config,
        run_dir=str((Path(config.output_dir) / config.name).absolute()),
        world_size=world_size,
        deepspeed=deepspeed,
        batches=_batches(config, world_size),
        **sizes,
    )


def _batches(config: RunConfig, world_size: int) -> Batches:
    batch, steps = config.batch, config.schedule.steps
    return Batches(
        tokens_per_step=batch.tokens_per_step,
        max_tokens_per_device=batch.max_tokens_per_device,
        least_micro_steps=ceil(batch.tokens_per_step / (batch.max_tokens_per_device * world_size)),
        steps=steps,
        epochs=config.schedule.epochs,
        total_tokens=steps * batch.tokens_per_step if steps else None,
    )


def _sizes(
    config: RunConfig, model: ModelJson, tensors: Tensors, deepspeed: dict[str, Any], world_size: int
) -> dict[str, Any]:
    held, dtype, optimizer = held_weights(config, model, tensors), config.model.dtype, config.optimizer.name
    return {
        "num_parameters": num_parameters(tensors),
        "num_trained": num_parameters(held.trained),
        "memory": model_states(held, deepspeed=deepspeed, dtype=dtype, optimizer=optimizer, world_size=world_size),
        "logits_bytes": None if config.task == "classification" else _logits_bytes(config, model),
        # Moments of 8 bits are saved in float32.
        "checkpoint_bytes": FLOAT32_BYTES * num_parameters(held.trained)
        + state_bytes(held.trained, optimizer.removesuffix("_8bit")),
    }


def _logits_bytes(config: RunConfig, model: ModelJson) -> int:
    """Of one micro-batch: in the compute type, and once more in float32 for the loss."""
    dtype = config.model.dtype
    width = WEIGHT_BYTES[dtype] + (0 if dtype == "float32" else FLOAT32_BYTES)
    vocabulary = model.get("decoder_vocab_size") or model["vocab_size"]
    return int(config.batch.max_tokens_per_device * vocabulary * width)


def _fit_nvme_buffers(deepspeed: dict[str, Any], tensors: Tensors, world_size: int) -> None:
    """Make DeepSpeed's NVMe buffers as large as a rank's part of the largest tensor: its default of 100 M values is
    too small for a large vocabulary on few ranks (an assertion in the first step) and wasteful for small models."""
    if offload_device(deepspeed, "param") == "nvme":
        largest = max(tensor.size for tensor in tensors.values())
        deepspeed["zero_optimization"]["offload_param"].setdefault("buffer_size", ceil(largest / world_size))


def _check_positions(config: RunConfig, model: ModelJson) -> list[str]:
    """Warnings. A table of positions ends; relative and rotary positions go on, but unseen in training.

    Raises ConfigError.
    """
    names = ("max_source_length", "max_target_length") if config.task == "translation" else ("max_length",)
    virtual = 0
    if config.adapter is not None and config.adapter.method in PROMPT_METHODS:
        virtual = config.adapter.num_virtual_tokens
    limit, trained = position_limit(model), trained_length(model)
    warnings = []
    for name in names:
        length = getattr(config.data, name)
        if limit is not None and length + virtual > limit:
            beside = f" and {virtual} virtual tokens" if virtual else ""
            what = f"data.{name}: {length}{beside} is more than the {limit} positions of the model"
            raise ConfigError(what, hint=f"lower it to {limit - virtual}")
        if trained is not None and length > trained:
            warnings.append(f"data.{name}: {length} is more than the {trained} positions the model was trained with")
    return warnings
