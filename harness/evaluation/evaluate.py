"""Decode and score a set of rows on all ranks. The same code serves training and `harness evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.config.schema import EvaluationConfig, LossConfig, RunConfig
from harness.data.batches import cut_step
from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings, beam_search, deal, decoding_batches
from harness.engine.processes import Processes
from harness.evaluation.report import write_evaluation
from harness.evaluation.scores import Scores, corpus_scores
from harness.objectives.cross_entropy import label_smoothed_cross_entropy
from harness.tasks.translation import TranslationTask


class EvaluationInterrupted(Exception):
    """A stop was agreed on while decoding; nothing of this evaluation is kept."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set, with its texts in row order; `losses` (loss, nll) are per target token."""

    sources: list[str]
    references: list[str]
    hypotheses: list[str]
    scores: Scores
    settings: BeamSettings
    decode_seconds: float
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {**self.losses, **self.scores.values}

    def write(self, directory: Path) -> None:
        """The files of docs/evaluation.md. Raises OSError, or HarnessError if `directory` holds something else."""
        write_evaluation(directory, **vars(self))


def beam_settings(options: EvaluationConfig, max_target_length: int, num_hypotheses: int = 1) -> BeamSettings:
    """The search that `evaluation:` asks for; `max_target_length` is the limit where it names none."""
    return BeamSettings(
        options.beam_size,
        options.length_penalty,
        options.max_target_length or max_target_length,
        options.max_length_ratio,
        num_hypotheses,
    )


def decode_rows(
    model: Any,
    rows: EncodedRows,
    task: TranslationTask,
    processes: Processes,
    *,
    settings: BeamSettings,
    max_tokens: int,
    num_rows: int | None = None,
    synced: bool = False,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Text of the best hypothesis of each of the first `num_rows` rows, in row order, on every rank.

    Batches are a function of the rows alone and are dealt to the ranks, so the output does not depend on their number.
    Raises EvaluationInterrupted on all ranks when one of them wants to stop.
    """
    sizes = rows.source_sizes[:num_rows].tolist()
    batches = decoding_batches(sizes, beam_size=settings.beam_size, max_tokens=max_tokens)
    found: list[tuple[int, str]] = []
    for turn in deal(batches, processes.rank, processes.world_size):
        if processes.sum([stop_wanted()])[0]:
            raise EvaluationInterrupted
        inputs = task.collate_sources(rows.take(turn.rows), processes.device)
        best = beam_search(model, **inputs, settings=settings, synced=synced)
        if turn.counts:
            found += [
                (row, task.to_text(hypotheses[0].token_ids)) for row, hypotheses in zip(turn.rows, best, strict=True)
            ]
    everyone = sorted(tuple(pair) for part in processes.gather(found) for pair in part)
    assert [row for row, _ in everyone] == list(range(len(sizes))), "every row is decoded exactly once"
    return [text for _, text in everyone]


def measure_loss(
    model: Any,
    rows: EncodedRows,
    task: TranslationTask,
    processes: Processes,
    *,
    loss: LossConfig,
    max_tokens: int,
    num_rows: int | None = None,
) -> dict[str, float]:
    """`loss` (smoothed) and `nll` per target token over the first `num_rows` rows, without dropout.

    Batches are those of one process, dealt to the ranks, so the values do not depend on the number of ranks.
    """
    sizes = np.maximum(rows.source_sizes, rows.target_sizes)[:num_rows]
    limit = max(max_tokens, int(sizes.max()))
    batches = cut_step(np.arange(len(sizes)), sizes, max_tokens_per_device=limit, world_size=1)
    turns = deal([batch.tolist() for (batch,) in batches], processes.rank, processes.world_size)
    sums = [0.0, 0.0, 0.0]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for turn in turns:
            batch = task.collate(rows.take(turn.rows if turn.counts else []), processes.device)
            logits_BTV = model(**batch.inputs, use_cache=False).logits
            terms = label_smoothed_cross_entropy(
                logits_BTV, batch.labels_BT, epsilon=loss.label_smoothing, convention=loss.convention
            )
            sums = [total + float(term) for total, term in zip(sums, terms, strict=True)]
    model.train(was_training)
    loss_sum, nll_sum, num_tokens = processes.sum(sums)
    return {"loss": loss_sum / num_tokens, "nll": nll_sum / num_tokens}


def evaluate(
    model: Any,
    rows: EncodedRows,
    task: TranslationTask,
    processes: Processes,
    *,
    config: RunConfig,
    num_rows: int | None = None,
    synced: bool = False,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss, beam search and corpus scores of one set, on every rank. `config.evaluation` must be set."""
    options = config.evaluation
    assert options is not None
    max_tokens = options.max_tokens_per_device or config.batch.max_tokens_per_device
    settings = beam_settings(options, config.data.max_target_length)
    losses = measure_loss(
        model, rows, task, processes, loss=config.loss, max_tokens=config.batch.max_tokens_per_device, num_rows=num_rows
    )
    started = time.monotonic()
    hypotheses = decode_rows(
        model, rows, task, processes,
        settings=settings, max_tokens=max_tokens, num_rows=num_rows, synced=synced, stop_wanted=stop_wanted,
    )  # fmt: skip
    decode_seconds = time.monotonic() - started
    sources, references = rows.texts("source")[:num_rows], rows.texts("target")[:num_rows]
    languages = set(rows.texts("target_language")[:num_rows])
    language = languages.pop() if len(languages) == 1 else None
    scores = corpus_scores(hypotheses, references, options.metrics, target_language=language)
    return Evaluation(sources, references, hypotheses, scores, settings, decode_seconds, losses)
