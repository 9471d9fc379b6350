"""Translation with an encoder-decoder: what a row becomes, and what a decoded row reads like.

Shapes: B rows, S source positions, T target positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.config.schema import DataConfig, LossConfig
from harness.data.encoded import Encoded
from harness.data.rows import Row
from harness.models.families import Family
from harness.objectives.cross_entropy import LossTerms, label_smoothed_cross_entropy
from harness.tasks.task import IGNORED, Batch, DecodingTask, Example, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TranslationTask(DecodingTask):
    """Rows, token ids and text of one tokeniser and model family. The marker of an example is the decoder's start."""

    tokenizer: PreTrainedTokenizerBase
    family: Family
    data: DataConfig
    objective: LossConfig

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Token ids of many rows, language tags included; raises DataError for a tag the tokeniser lacks."""
        sources = self.family.encode_sources(
            self.tokenizer,
            [self.data.source_prefix + row.source for row in rows],
            [row.source_language for row in rows],
            self.data.max_source_length,
        )
        targets = self.family.encode_targets(
            self.tokenizer,
            [row.target for row in rows],
            [row.target_language for row in rows],
            self.data.max_target_length,
        )
        return [
            Encoded(source.ids, target.ids, self._start(row.target_language), source.truncated or target.truncated)
            for row, source, target in zip(rows, sources, targets, strict=True)
        ]

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Pad examples; no examples give one row without target tokens.

        The decoder input is always `[decoder_start] + labels[:-1]`.
        """
        num_tokens = sum(max(len(source), len(labels)) for source, labels, _ in examples)
        pad_id, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        sources = [source for source, _, _ in examples] or [[eos]]
        labels = [labels for _, labels, _ in examples] or [[IGNORED]]
        starts = [[start, *row[:-1]] for _, row, start in examples] or [[eos]]
        input_ids_BS = pad(sources, pad_id)
        mask_BS = pad([[1] * len(source) for source in sources], 0)
        inputs = {"input_ids": input_ids_BS, "attention_mask": mask_BS, "decoder_input_ids": pad(starts, pad_id)}
        labels_BT = pad(labels, IGNORED)
        padded = len(examples) * max(input_ids_BS.shape[1], labels_BT.shape[1])
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        return Batch({**on_device, "use_cache": False}, labels_BT.to(device), padded, num_tokens)

    def made_up(self, token_ids: Sequence[list[int]]) -> list[Example]:
        start = self.tokenizer.eos_token_id
        return [(source, labels, start) for source, labels in zip(token_ids, reversed(token_ids), strict=True)]

    def loss(self, logits: Tensor, batch: Batch) -> LossTerms:
        """Label-smoothed cross entropy of the target tokens."""
        smoothing, convention = self.objective.label_smoothing, self.objective.convention
        return label_smoothed_cross_entropy(logits, batch.labels, epsilon=smoothing, convention=convention)

    def collate_sources(self, examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
        """What beam search needs of the same examples: sources, decoder starts and forced first tokens."""
        sources = [source for source, _, _ in examples]
        forced = [int(row[0]) for _, row, _ in examples] if self.family.force_language else None
        return {
            "input_ids_BS": pad(sources, self.tokenizer.pad_token_id).to(device),
            "attention_mask_BS": pad([[1] * len(source) for source in sources], 0).to(device),
            "decoder_start_B": torch.tensor([start for _, _, start in examples], device=device),
            "forced_first": forced,
        }

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return self.family.target_pieces_of(self.tokenizer, texts)

    def to_text(self, token_ids: Sequence[int]) -> str:
        """Text of a hypothesis, one line, tags left out."""
        return " ".join(self.family.decode(self.tokenizer, [token_ids])[0].split())

    def show(self, row: Row) -> str:
        """One row as the model will see it, token by token, and what beam search starts with, for `harness check`."""
        (encoded,) = self.encode([row])
        starts = [encoded.marker, *encoded.labels[:-1]]
        parts = {"source": encoded.input_ids, "decoder input": starts, "labels": encoded.labels}
        lines = {name: " ".join(self.tokenizer.convert_ids_to_tokens(ids)) for name, ids in parts.items()}
        start, first = self.tokenizer.convert_ids_to_tokens([encoded.marker, encoded.labels[0]])
        forced = f"{first} is forced first" if self.family.force_language else "no token is forced"
        lines["beam search"] = f"starts with {start}, {forced}"
        width = max(map(len, lines))
        return "\n".join(f"{name:>{width}}: {text}" for name, text in lines.items())

    def _start(self, language: str | None) -> int:
        if language not in self._starts:
            self._starts[language] = self.family.decoder_start(self.tokenizer, language)
        return self._starts[language]

    @cached_property
    def _starts(self) -> dict[str | None, int]:
        return {}
