"""What every task is to the loop: rows become numbers, numbers a batch, logits and a batch the sums of a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.config.schema import DataConfig
from harness.data.encoded import Encoded
from harness.data.rows import BadRow, Row
from harness.objectives.cross_entropy import LossTerms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
Tokens = Sequence[int] | NDArray[np.int32]
Example = tuple[Tokens, Any, int]  # input_ids, labels, marker


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch on the device; `inputs` are the keyword arguments of the model's forward pass."""

    inputs: dict[str, Any]
    labels: Tensor
    num_padded_tokens: int
    num_tokens: int


class Task(ABC):
    """A tokeniser and everything that is special about a kind of row."""

    tokenizer: PreTrainedTokenizerBase

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Numbers of each row, in order. Raises DataError for a row that the task cannot have."""

    def encode_for_training(self, rows: list[Row]) -> list[tuple[Row, Encoded] | BadRow]:
        """Every training example of the rows with the row it comes from, or why a row has none."""
        return list(zip(rows, self.encode(rows), strict=True))

    def encode_for_scores(self, rows: list[Row]) -> list[tuple[Row, Encoded] | BadRow]:
        """What is scored of the rows of a validation or test set."""
        return list(zip(rows, self.encode(rows), strict=True))

    @abstractmethod
    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """A padded batch. No examples give one whose loss is exactly zero, so that a rank short of rows still takes
        part in the collectives of a forward and backward pass."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> LossTerms:
        """Sums over the batch, to be divided by the targets of the whole step."""

    def made_up(self, token_ids: Sequence[list[int]]) -> list[Example]:
        """Examples with these inputs, to compare models on."""
        return [(ids, ids, 0) for ids in token_ids]

    @abstractmethod
    def show(self, row: Row) -> str:
        """One row as the model will see it, for `harness check`."""


class Output(NamedTuple):
    """One output of a row, with its score (`BeamSettings.formula`); `is_at_limit` as that of a `Hypothesis`."""

    text: str
    score: float
    is_at_limit: bool = False


class DecodingTask(Task):
    """A task whose model answers in text."""

    data: DataConfig

    def encode_sources(self, rows: Sequence[Row]) -> list[Encoded]:
        """As `encode`, of rows that have no answer yet."""
        return self.encode(rows)

    @abstractmethod
    def collate_sources(self, examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
        """What beam search needs of the examples: see `decoding.beam.decode`."""

    @abstractmethod
    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as they stand in an output, without special tokens."""

    def ways_to_write(self, text: str) -> list[tuple[int, ...]]:
        """Token ids of a text at the start of an output and after a space; one way if these are the same."""
        return list(dict.fromkeys(tuple(ids) for ids in self.pieces([text, f" {text}"]) if ids))

    @abstractmethod
    def to_text(self, token_ids: Sequence[int]) -> str:
        """Text of a hypothesis, one line, without special tokens."""


def pad(rows: Sequence[Tokens], value: int) -> Tensor:
    """int64 [rows, longest], filled up with `value` at the end."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
