"""Lines to lines: beam search on text that has no reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, decode
from harness.evaluation.outputs import PARTING, outputs_of, phrases_of
from harness.tasks.task import DecodingTask, Output


class Translated(NamedTuple):
    """The outputs of one line, best first; none for a line without text. `truncated`: its end was left out."""

    outputs: list[Output]
    truncated: bool


@dataclass(frozen=True)
class Translator:
    """A model with everything that is the same for every line. `max_tokens` limits a batch: rows x beams x source."""

    model: Any
    task: DecodingTask
    settings: BeamSettings
    max_tokens: int
    device: torch.device

    def __call__(self, lines: Sequence[str], first: int = 0, *, with_phrases: bool = False) -> list[Translated]:
        """The outputs of each line, in order; raises DataError if a language is missing or unknown.

        Where outputs are drawn they follow from the number of a line, counted from `first`. With `with_phrases` a line
        is a source and, after tabs, phrases that its outputs must have.
        """
        data = self.task.data
        rows = []
        for number, line in enumerate(lines, start=first + 1):
            source, *phrases = line.split("\t") if with_phrases else [line]
            languages = (data.source_language, data.target_language)
            rows.append(Row(f"line {number}", source, "", *languages, constraints=PARTING.join(phrases)))
        return self.of_rows(rows, first)

    def of_rows(self, rows: Sequence[Row], first: int = 0) -> list[Translated]:
        """The outputs of each row in its own languages, in order."""
        encoded = self.task.encode_sources(rows)
        results = [Translated([], one.truncated) for one in encoded]

        def collate(places: list[int]) -> dict[str, Any]:
            examples = [(encoded[place].input_ids, encoded[place].labels, encoded[place].marker) for place in places]
            return self.task.collate_sources(examples, self.device)

        found = decode(
            self.model, [len(one.input_ids) for one in encoded], collate,
            settings=self.settings, max_tokens=self.max_tokens, first_row=first,
            phrases=phrases_of([row.constraints for row in rows], self.task),
            rows=[place for place, row in enumerate(rows) if row.source.strip()],
        )  # fmt: skip
        assert found is not None, "nobody asked to stop"
        for place, best in found.items():
            results[place].outputs.extend(outputs_of(best, self.task, self.settings, rows[place].target_language))
        return results
