"""Decode rows on all ranks and score the texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import EvaluationConfig, RunConfig
from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings, decode
from harness.decoding.constraints import Constraints
from harness.engine.processes import Processes
from harness.evaluation.report import write_evaluation
from harness.evaluation.result import Evaluation, EvaluationInterrupted
from harness.evaluation.scores import Scores, corpus_scores
from harness.tasks.task import DecodingTask


@dataclass(frozen=True)
class Decoded(Evaluation):
    """Scores of the best hypotheses, with the texts in row order."""

    sources: list[str]
    references: list[str]
    hypotheses: list[str]
    scores: Scores
    settings: BeamSettings

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


def beam_settings(options: EvaluationConfig, max_target_length: int, num_hypotheses: int = 1) -> BeamSettings:
    """The search that `evaluation:` asks for; `max_target_length` is the limit where it names none."""
    constraints = Constraints(options.min_target_length, options.no_repeat_ngram, options.repetition_penalty)
    return BeamSettings(
        options.beam_size,
        options.length_penalty,
        options.max_target_length or max_target_length,
        options.max_length_ratio,
        num_hypotheses,
        options.preset,
        constraints=None if constraints == Constraints() else constraints,
    )


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
) -> Decoded:
    """Beam search and corpus scores of the first `num_rows` rows, on every rank."""
    options = config.evaluation
    assert options is not None
    started = time.monotonic()
    settings = beam_settings(options, config.data.max_target_length)
    hypotheses = decode_rows(
        model, rows, task, processes,
        settings=settings, max_tokens=options.max_tokens_per_device or config.batch.max_tokens_per_device,
        num_rows=num_rows, synced=synced, stop_wanted=stop_wanted,
    )  # fmt: skip
    seconds = time.monotonic() - started
    sources, references = rows.texts("source")[:num_rows], rows.texts("target")[:num_rows]
    languages = set(rows.texts("target_language")[:num_rows])
    language = languages.pop() if len(languages) == 1 else None
    scores = corpus_scores(hypotheses, references, options.metrics, target_language=language)
    return Decoded(losses, len(hypotheses), seconds, sources, references, hypotheses, scores, settings)


def decode_rows(
    model: Any,
    rows: EncodedRows,
    task: DecodingTask,
    processes: Processes,
    *,
    settings: BeamSettings,
    max_tokens: int,
    num_rows: int | None = None,
    synced: bool = False,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Text of the best hypothesis of each of the first `num_rows` rows, in row order, on every rank.

    Rows are dealt to the ranks by length. Raises EvaluationInterrupted on all ranks when one of them wants to stop.
    """
    sizes = rows.source_sizes[:num_rows].tolist()
    longest_first = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    found = decode(
        model, sizes, lambda ids: task.collate_sources(rows.take(ids), processes.device),
        settings=settings, max_tokens=max_tokens, rows=longest_first[processes.rank :: processes.world_size],
        synced=synced, agree=processes.sum, stop_wanted=stop_wanted,
    )  # fmt: skip
    if found is None:
        raise EvaluationInterrupted
    mine = [(row, task.to_text(hypotheses[0].token_ids)) for row, hypotheses in found.items()]
    everyone = sorted(tuple(pair) for part in processes.gather(mine) for pair in part)
    assert [row for row, _ in everyone] == list(range(len(sizes))), "every row is decoded exactly once"
    return [text for _, text in everyone]
