"""The model of a run as it is trained: base, head, adapter, and which of its parameters learn when."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from harness.config.schema import RunConfig
from harness.models.freeze import Freezing, resolve_freezing
from harness.models.heads import head_names
from harness.models.load import load_model


class Assembled(NamedTuple):
    """`new_heads`: names of the parameters of a classification head, which may have a learning rate of their own."""

    model: Any
    freezing: Freezing
    new_heads: frozenset[str]


def assemble(config: RunConfig, *, step: int, total_steps: int, device: str = "cpu") -> Assembled:
    """The model before step number `step` + 1: its trainable parameters are those that this step updates.

    Every rank, and every start of the run, gets the same weights; the device "meta" has names and shapes alone.
    """
    model: nn.Module = load_base(config, device=device)
    heads = head_names(model) if config.task == "classification" else set()
    if config.adapter is not None:
        from harness.models.adapters import add_adapter  # peft takes seconds to import

        model = add_adapter(model, config.adapter, task=config.task, total_steps=total_steps, seed=config.seed)
    freezing = resolve_freezing(model, config.freeze)
    freezing.apply(model, step + 1)
    modules = {f".{name.rpartition('.')[0]}." for name in heads}
    names = (name for name, _ in model.named_parameters())
    return Assembled(model, freezing, frozenset(name for name in names if any(head in f".{name}" for head in modules)))


def load_with_adapter(config: RunConfig, directory: Path) -> Any:
    """The base with the adapter that `adapter_files.save_adapter` has written."""
    from harness.models.adapter_files import load_adapter

    return load_adapter(load_base(config), directory)


def load_base(config: RunConfig, **options: Any) -> Any:
    """`load_model` with everything that the run file says of it."""
    return load_model(
        config.model,
        config.seed,
        task=config.task,
        classification=config.classification,
        frozen=config.adapter is not None,
        **options,
    )
