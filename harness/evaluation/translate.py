"""Lines to lines: beam search on text that has no reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, beam_search, decoding_batches
from harness.tasks.translation import TranslationTask


class Output(NamedTuple):
    """One output of a line, with its score (SCORE_FORMULA)."""

    text: str
    score: float


class Translated(NamedTuple):
    """The outputs of one line, best first; none for a line without text. `truncated`: its end was left out."""

    outputs: list[Output]
    truncated: bool


@dataclass(frozen=True)
class Translator:
    """A model with everything that is the same for every line. `max_tokens` limits a batch: rows x beams x source."""

    model: Any
    task: TranslationTask
    settings: BeamSettings
    max_tokens: int
    device: torch.device

    def __call__(self, lines: Sequence[str]) -> list[Translated]:
        """The outputs of each line, in order; raises DataError if a language is missing or unknown."""
        data = self.task.data
        return self.of_rows([Row("", line, "", data.source_language, data.target_language) for line in lines])

    def of_rows(self, rows: Sequence[Row]) -> list[Translated]:
        """The outputs of each row in its own languages, in order."""
        encoded = self.task.encode(rows)
        results = [Translated([], one.truncated) for one in encoded]
        filled = [index for index, row in enumerate(rows) if row.source.strip()]
        sizes = [len(encoded[index].input_ids) for index in filled]
        for batch in decoding_batches(sizes, beam_size=self.settings.beam_size, max_tokens=self.max_tokens):
            chosen = [filled[place] for place in batch]
            examples = [(encoded[i].input_ids, encoded[i].labels, encoded[i].marker) for i in chosen]
            inputs = self.task.collate_sources(examples, self.device)
            found = beam_search(self.model, **inputs, settings=self.settings, synced=False)
            for index, hypotheses in zip(chosen, found, strict=True):
                results[index].outputs.extend(Output(self.task.to_text(one.token_ids), one.score) for one in hypotheses)
        return results
