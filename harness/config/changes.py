"""Which keys of a run file may change between two starts of one run, and which decide what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness.config.schema import RunConfig

# Everything else decides the trajectory of the weights. A name stands for its whole section.
MAY_CHANGE = (
    "name", "output_dir", "evaluation", "early_stopping", "checkpoint", "monitor", "launch", "slurm", "deepspeed",
    "batch.max_tokens_per_device", "model.gradient_checkpointing",
)  # fmt: skip


class Change(NamedTuple):
    """A key with its value in both run files, None where it is missing."""

    key: str
    old: Any
    new: Any


def forbidden_changes(old: Mapping[str, Any], new: RunConfig) -> list[Change]:
    """Keys that must not differ in `new` from `old`, the plain values of an earlier start, but do.

    The score that chooses the best checkpoint is one of them, once there is one.
    """
    try:
        before = RunConfig.model_validate(old)
    except ValidationError:  # of another version of harness: compared as it stands
        old_values, watched = dict(leaves(old)), None
    else:
        old_values, watched = dict(leaves(before.model_dump(mode="json"))), before.watched_metric
    new_values = dict(leaves(new.model_dump(mode="json")))
    keys = [key for key in {**new_values, **old_values} if not _may_change(key)]
    changes = [Change(key, old_values.get(key), new_values.get(key)) for key in keys]
    if watched and new.watched_metric:
        key = "early_stopping.metric" if new.early_stopping else "evaluation.metrics.0"
        changes.append(Change(key, watched, new.watched_metric))
    return [change for change in changes if change.old != change.new]


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a section or a list of sections."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if _has_sections(value) else None
    if items is None:
        yield key, value
        return
    for name, inner in items:
        yield from leaves(inner, f"{key}.{name}" if key else str(name))


def _has_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value)
