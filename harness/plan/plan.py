"""The plan of a run: everything the ranks need to know, worked out once without torch or a GPU.

It is written to ``<run_dir>/plan.json``; the ranks read only that file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.config.schema import RunConfig
from harness.errors import ConfigError, DataError
from harness.plan.deepspeed import final_deepspeed_config
from harness.plan.parameters import model_json, parameter_shapes, position_limit
from harness.plan.zero import (
    WEIGHT_BYTES,
    Memory,
    Shapes,
    model_states,
    num_parameters,
    num_state_values,
    offload_device,
)

_FLOAT32_BYTES = 4


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
    """A checked run. ``num_parameters``, ``memory`` and the sizes are None if the model's config.json is not here."""

    config: RunConfig
    run_dir: str
    world_size: int
    deepspeed: dict[str, Any]
    batches: Batches
    num_parameters: int | None = None
    memory: Memory | None = None
    logits_bytes: int | None = None
    checkpoint_bytes: int | None = None

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
        _check_positions(config, model)
        shapes = parameter_shapes(model)
        _fit_nvme_buffers(deepspeed, shapes, world_size)
        vocabulary = model.get("decoder_vocab_size") or model["vocab_size"]
        sizes = _sizes(config, shapes, vocabulary, deepspeed, world_size)
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
    config: RunConfig, shapes: Shapes, vocabulary: int, deepspeed: dict[str, Any], world_size: int
) -> dict[str, Any]:
    parameters, dtype = num_parameters(shapes), config.model.dtype
    logits_width = WEIGHT_BYTES[dtype] + (0 if dtype == "float32" else _FLOAT32_BYTES)
    optimizer = config.optimizer.name
    return {
        "num_parameters": parameters,
        "memory": model_states(shapes, deepspeed=deepspeed, dtype=dtype, optimizer=optimizer, world_size=world_size),
        "logits_bytes": config.batch.max_tokens_per_device * vocabulary * logits_width,
        "checkpoint_bytes": _FLOAT32_BYTES * (parameters + num_state_values(shapes, optimizer)),
    }


def _fit_nvme_buffers(deepspeed: dict[str, Any], shapes: Shapes, world_size: int) -> None:
    """Make DeepSpeed's NVMe buffers as large as a rank's part of the largest tensor: its default of 100 M values is
    too small for a large vocabulary on few ranks (an assertion in the first step) and wasteful for small models."""
    if offload_device(deepspeed, "param") == "nvme":
        largest = max(prod(shape) for shape in shapes)
        deepspeed["zero_optimization"]["offload_param"].setdefault("buffer_size", ceil(largest / world_size))


def _check_positions(config: RunConfig, model: dict[str, Any]) -> None:
    limit = position_limit(model)
    for name in ("max_source_length", "max_target_length"):
        length = getattr(config.data, name)
        if limit is not None and length > limit:
            raise ConfigError(
                f"data.{name}: {length} is more than the {limit} positions of the model", hint=f"lower it to {limit}"
            )
