"""Which parameters are trained in which step, from the run file's freeze rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from harness.config.layers import layer_numbers
from harness.config.nearest import did_you_mean
from harness.config.schema import FreezeRule
from harness.errors import ConfigError
from harness.models.layers import embedding_names, stack_sizes
from harness.plan.layers import DECODER, ENCODER, ONLY, layer_places


@dataclass(frozen=True)
class Freezing:
    """`until`: each frozen parameter with the last step that leaves it alone, None: all do. `names`: all others too,
    in the model's order; a parameter that the model itself never trains is in neither."""

    names: tuple[str, ...]
    until: Mapping[str, int | None]

    def trainable_at(self, step: int) -> list[str]:
        """Parameters that step number `step` (from 1) updates; step 0 is a run that has done none, as 1."""
        return [name for name in self.names if not self._is_frozen(name, max(step, 1))]

    @property
    def starts(self) -> dict[str, int]:
        """The step after which a parameter is trained, for those that are not from the first."""
        return {name: until for name, until in self.until.items() if until is not None}

    def apply(self, model: nn.Module, step: int) -> None:
        """Set `requires_grad` for step number `step`."""
        trainable = set(self.trainable_at(step))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)

    def _is_frozen(self, name: str, step: int) -> bool:
        if name not in self.until:
            return False
        until = self.until[name]
        return until is None or step <= until


def phase_boundaries(rules: FreezeRule | Sequence[FreezeRule]) -> list[int]:
    """Steps after which more parameters are trained than before, in order."""
    return sorted({rule.until_step for rule in _listed(rules) if rule.until_step is not None})


def resolve_freezing(model: nn.Module, rules: FreezeRule | Sequence[FreezeRule]) -> Freezing:
    """Apply the rules to the names of a model; a parameter under several rules is frozen as long as one of them says.

    An embedding that is shared with the head, or between encoder and decoder, is one parameter under all its names.
    Raises ConfigError when a part of a rule matches nothing, or nothing is left to train.
    """
    until: dict[str, int | None] = {}
    for index, rule in enumerate(_listed(rules)):
        where = "freeze" if isinstance(rules, FreezeRule) else f"freeze.{index}"
        for name in _matches(model, rule, where):
            ends = (rule.until_step, until.get(name, 0))
            until[name] = None if None in ends else max(end for end in ends if end is not None)
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    freezing = Freezing(names, {name: until[name] for name in names if name in until})
    if not freezing.trainable_at(1):
        raise ConfigError("every parameter is frozen: there is nothing to train", where="freeze")
    return freezing


def _listed(rules: FreezeRule | Sequence[FreezeRule]) -> Sequence[FreezeRule]:
    return [rules] if isinstance(rules, FreezeRule) else rules


def _matches(model: nn.Module, rule: FreezeRule, where: str) -> set[str]:
    """Names of the parameters that any part of the rule means."""
    found: set[str] = set()
    for stack in (ENCODER, DECODER, ONLY):
        if (text := getattr(rule, stack)) is not None:
            found |= _layers(model, stack, text, f"{where}.{stack}")
    if rule.embeddings:
        found |= embedding_names(model)
    for number, pattern in enumerate(rule.patterns):
        found |= _pattern(model, pattern, f"{where}.patterns.{number}")
    return found


def _layers(model: nn.Module, stack: str, text: str, where: str) -> set[str]:
    places = layer_places(name for name, _ in model.named_parameters())
    sizes = stack_sizes(places.values())
    available = ", ".join(f"`{name}: 0-{size - 1}`" for name, size in sizes.items()) or "no numbered layers"
    if stack not in sizes:
        what = "this model has more than one stack" if stack == ONLY else f"this model has no {stack}"
        raise ConfigError(what, where=where, hint=f"it has {available}")
    every = frozenset(range(sizes[stack]))
    numbers = layer_numbers(text) or every
    if beyond := sorted(numbers - every):
        raise ConfigError(f"there is no layer {beyond[0]}", where=where, hint=f"the model has {available}")
    return {name for name, place in places.items() if place.stack == stack and place.number in numbers}


def _pattern(model: nn.Module, pattern: str, where: str) -> set[str]:
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    all_names = {name: first_names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    found = {first for name, first in all_names.items() if re.search(pattern, name)}
    if not found:
        parts = {part for name in all_names for part in name.split(".")}
        raise ConfigError(f"no parameter's name matches {pattern!r}{did_you_mean(pattern, sorted(parts))}", where=where)
    return found
