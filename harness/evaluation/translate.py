"""Lines to lines: beam search on text that has no reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, decode
from harness.evaluation.outputs import Output
from harness.tasks.translation import TranslationTask


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

        def collate(places: list[int]) -> dict[str, Any]:
            chosen = [encoded[filled[place]] for place in places]
            examples = [(one.input_ids, one.labels, one.marker) for one in chosen]
            return self.task.collate_sources(examples, self.device)

        found = decode(self.model, sizes, collate, settings=self.settings, max_tokens=self.max_tokens)
        assert found is not None, "nobody asked to stop"
        for place, hypotheses in found.items():
            results[filled[place]].outputs.extend(Output(self.task.to_text(o.token_ids), o.score) for o in hypotheses)
        return results
