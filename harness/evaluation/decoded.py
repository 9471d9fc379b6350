"""Decode rows on all ranks and score the texts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings
from harness.engine.processes import Processes
from harness.evaluation.outputs import decode_rows
from harness.evaluation.partial import Partial
from harness.evaluation.result import Evaluation
from harness.evaluation.settings import beam_settings
from harness.models.precision import in_precision
from harness.reports.report import write_evaluation
from harness.reports.sentences import Sentences
from harness.scoring.buckets import LanguagePair
from harness.scoring.scores import Scores, corpus_scores
from harness.scoring.significance import WrittenEvaluation
from harness.tasks.task import DecodingTask, Output


@dataclass(frozen=True)
class Decoded(Evaluation):
    """Scores of the best hypotheses, with the texts in row order; `outputs` are the n best of each row."""

    sources: list[str]
    references: list[str]
    language_pairs: list[LanguagePair]
    outputs: list[list[Output]]
    scores: Scores
    settings: BeamSettings
    precision: str = "model"
    prompt: Mapping[str, Any] | None = None

    @property
    def hypotheses(self) -> list[str]:
        return [best[0].text for best in self.outputs]

    @property
    def values(self) -> dict[str, float]:
        return {**self.losses, **self.scores.values}

    @property
    def limits(self) -> dict[str, float]:
        intervals = self.scores.confidence.items()
        return {
            f"{name}_{end}": limit for name, ends in intervals for end, limit in zip(("low", "high"), ends, strict=True)
        }

    @property
    def signatures(self) -> dict[str, str]:
        return self.scores.signatures

    def samples(self) -> Iterator[tuple[str, str, str]]:
        return zip(self.sources, self.references, self.hypotheses, strict=True)

    def write(self, directory: Path, baseline: WrittenEvaluation | None = None) -> None:
        sentences = Sentences.of(self.sources, self.references, self.outputs, self.language_pairs)
        write_evaluation(
            directory, sentences, self.scores, self.settings,
            decode_seconds=self.seconds, losses=self.losses, precision=self.precision, baseline=baseline,
            prompt=self.prompt,
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
    partial: Partial | None,
) -> Decoded:
    """Beam search and corpus scores of the first `num_rows` rows, on every rank."""
    options = config.evaluation
    assert options is not None
    started = time.monotonic()
    settings = beam_settings(config, task)
    prompt = _prompt(config)
    if partial is not None:
        texts = repr([rows.texts(name)[:num_rows] for name in ("constraints", "target_language")])
        texts_digest = hashlib.sha256(texts.encode()).hexdigest()
        key = f"{settings} {prompt} {options.precision} {rows.digest} {num_rows} {texts_digest} {losses['nll']:.6g}"
        partial = replace(partial, key=f"{partial.key} {key}")
    outputs = decode_rows(
        in_precision(model, options.precision, is_whole=not synced), rows, task, processes,
        settings=settings, max_tokens=options.max_tokens_per_device or config.batch.max_tokens_per_device,
        num_rows=num_rows, synced=synced, stop_wanted=stop_wanted,
        partial=partial,
    )  # fmt: skip
    seconds = time.monotonic() - started + (partial.seconds_before if partial is not None else 0.0)
    sources, references = rows.texts("source")[:num_rows], rows.texts("target")[:num_rows]
    pairs = list(zip(rows.texts("source_language"), rows.texts("target_language"), strict=True))[:num_rows]
    languages = {target for _, target in pairs}
    scores = corpus_scores(
        [best[0].text for best in outputs], references, options.metrics,
        target_language=languages.pop() if len(languages) == 1 else None,
        bootstrap_samples=options.bootstrap_samples,
    )  # fmt: skip
    return Decoded(
        losses, len(outputs), seconds, sources, references, pairs, outputs, scores, settings, options.precision, prompt
    )


def _prompt(config: RunConfig) -> dict[str, Any] | None:
    """How a language model was asked, and what ended its answers."""
    if config.task != "causal_lm" or config.evaluation is None:
        return None
    asked = config.data.model_dump(mode="json", include={"prompt_template", "few_shot", "system_prompt"})
    return {**asked, "stop_strings": config.evaluation.stop_strings}
