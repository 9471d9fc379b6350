"""Several models as one: the probability of a token is the mean of theirs, as fairseq and Marian take it.

Shapes: R sentences, N running outputs of each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from harness.errors import ConfigError
from harness.models.stepper import Stepper
from harness.models.tree import Tree


class Ensemble(nn.Module):
    """Models that share a tokeniser. Its logits are log p. Raises ConfigError for another size of the vocabulary."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        sizes = [model.config.get_text_config().vocab_size for model in models]
        if len(set(sizes)) > 1:
            raise ConfigError(f"the models have outputs for {sizes} tokens: these must be as many", where="--ensemble")
        self.members = nn.ModuleList(models)

    @property
    def config(self) -> Any:
        return self.members[0].config

    def forward(self, **inputs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=mean_log_p([member(**inputs).logits for member in self.members]))


@dataclass
class Trees:
    """What the running outputs look back on in each model."""

    members: list[Tree]

    @property
    def has_room(self) -> bool:
        return self.members[0].has_room

    def forget_last_step(self) -> None:
        for tree in self.members:
            tree.forget_last_step()


class EnsembleStepper:
    """As `Stepper`, of several models that take the same steps."""

    def __init__(self, ensemble: Ensemble, num_outputs: int) -> None:
        self.members = [Stepper(model, num_outputs) for model in ensemble.members]
        self.reads_alone = any(member.reads_alone for member in self.members)
        tables = [member.num_positions for member in self.members if member.num_positions is not None]
        self.num_positions = min(tables, default=None)

    @contextmanager
    def ready(self) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.ready())
            yield

    def read(self, input_ids_RS: Tensor, mask_RS: Tensor, prefix_RP: Tensor) -> tuple[Tensor, Trees]:
        found = [member.read(input_ids_RS, mask_RS, prefix_RP) for member in self.members]
        return mean_log_p([logits_RV for logits_RV, _ in found]), Trees([tree for _, tree in found])

    def step(self, trees: Trees, tokens_RN: Tensor, parents_RN: Tensor, is_open_R: Tensor) -> Tensor:
        steps = zip(self.members, trees.members, strict=True)
        return mean_log_p([member.step(tree, tokens_RN, parents_RN, is_open_R) for member, tree in steps])

    def merge(self, *parts: tuple[Trees, Tensor]) -> Trees:
        return Trees([
            member.merge(*((trees.members[place], rows) for trees, rows in parts))
            for place, member in enumerate(self.members)
        ])  # fmt: skip


def stepper_of(model: Any, num_outputs: int) -> Any:
    """The stepper of a model or an ensemble."""
    return EnsembleStepper(model, num_outputs) if isinstance(model, Ensemble) else Stepper(model, num_outputs)


def mean_log_p(logits: Sequence[Tensor]) -> Tensor:
    """log of the mean of the models' p, in float32, of logits [..., V] of each."""
    log_p = torch.stack([one.float().log_softmax(dim=-1) for one in logits])
    return log_p.logsumexp(dim=0) - math.log(len(logits))
