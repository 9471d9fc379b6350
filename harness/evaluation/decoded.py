"""Decode rows on all ranks and score the texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings
from harness.engine.processes import Processes
from harness.evaluation.outputs import Output, decode_rows
from harness.evaluation.report import write_evaluation
from harness.evaluation.result import Evaluation
from harness.evaluation.scores import Scores, corpus_scores
from harness.evaluation.settings import beam_settings
from harness.tasks.task import DecodingTask


@dataclass(frozen=True)
class Decoded(Evaluation):
    """Scores of the best hypotheses, with the texts in row order; `outputs` are the n best of each row."""

    sources: list[str]
    references: list[str]
    outputs: list[list[Output]]
    scores: Scores
    settings: BeamSettings

    @property
    def hypotheses(self) -> list[str]:
        return [best[0].text for best in self.outputs]

    @property
    def values(self) -> dict[str, float]:
        return {**self.losses, **self.scores.values}

    @property
    def signatures(self) -> dict[str, str]:
        return self.scores.signatures

    def samples(self) -> Iterator[tuple[str, str, str]]:
        return zip(self.sources, self.references, self.hypotheses, strict=True)

    def write(self, directory: Path) -> None:
        write_evaluation(
            directory, sources=self.sources, references=self.references, hypotheses=self.hypotheses,
            scores=self.scores, settings=self.settings, decode_seconds=self.seconds, losses=self.losses,
        )  # fmt: skip


def decode_and_score(
    model: Any,
    rows: EncodedRows,
    task: DecodingTask,
    processes: Processes,
    *,
    config: RunConfig,
    losses: dict[str, float],
    num_rows: int | None,
    synced: bool,
    stop_wanted: Callable[[], bool],
    partial: Path | None,
) -> Decoded:
    """Beam search and corpus scores of the first `num_rows` rows, on every rank."""
    options = config.evaluation
    assert options is not None
    started = time.monotonic()
    settings = beam_settings(options, config.data.max_target_length)
    outputs = decode_rows(
        model, rows, task, processes,
        settings=settings, max_tokens=options.max_tokens_per_device or config.batch.max_tokens_per_device,
        num_rows=num_rows, synced=synced, stop_wanted=stop_wanted, partial=partial,
    )  # fmt: skip
    seconds = time.monotonic() - started
    sources, references = rows.texts("source")[:num_rows], rows.texts("target")[:num_rows]
    languages = set(rows.texts("target_language")[:num_rows])
    language = languages.pop() if len(languages) == 1 else None
    scores = corpus_scores([best[0].text for best in outputs], references, options.metrics, target_language=language)
    return Decoded(losses, len(outputs), seconds, sources, references, outputs, scores, settings)
