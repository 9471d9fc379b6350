"""An adapter added into the weights of its base: only if the merged model says what base and adapter have said."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch

from harness.config.evaluation_schema import EvaluationConfig
from harness.config.schema import RunConfig
from harness.data.rows import Row
from harness.data.sources import read_rows
from harness.errors import DataError
from harness.evaluation.settings import beam_settings
from harness.evaluation.translate import Translator
from harness.scoring.scores import corpus_scores
from harness.tasks.task import Task
from harness.tasks.translation import TranslationTask
from harness.training.prepare import evaluation_sources

NUM_ROWS = 32  # translated before and after


class Tolerance(NamedTuple):
    """What a merge may change: logits, as a share of the largest one, and BLEU, in points of 100."""

    logits: float
    bleu: float


IN_FLOAT32 = Tolerance(logits=1e-4, bleu=0.1)
# 8-bit layers round what enters them too, plain layers do not: a search then takes other near ties (measured on 32 rows
# of a small model: 1 % of the largest logit and 1.8 points).
OF_8_BITS = Tolerance(logits=1e-1, bleu=5.0)


def in_float32(config: RunConfig) -> RunConfig:
    """With products of float32: in 16 bits both sides of a merge are rounded by more than a wrong merge may change."""
    quantization = config.model.quantization
    if quantization is not None:
        quantization = quantization.model_copy(update={"compute_dtype": "float32"})
    model = config.model.model_copy(update={"dtype": "float32", "quantization": quantization})
    return config.model_copy(update={"model": model})


def merged(model: Any, inputs: dict[str, Any], config: RunConfig, task: Task) -> tuple[Any, str]:
    """The base with the adapter in its weights, in float32, and for the user what became of BLEU.

    The logits on `inputs` are compared and, of a translation model, BLEU on a few rows of the run. Raises DataError if
    one of them has changed by more than it may.
    """
    from harness.models.adapter_files import merge_adapter, mergeable
    from harness.models.quantization import merge_gate

    quantization = config.model.quantization
    tolerance = OF_8_BITS if quantization is not None and quantization.bits == 8 else IN_FLOAT32
    mergeable(model.eval())
    before = bleu_of(model, config, task)
    with torch.no_grad():
        unmerged = model(**inputs).logits
        whole = merge_adapter(model).float().eval()
        merge_gate(unmerged, whole(**inputs).logits, tolerance=tolerance.logits)
    after = bleu_of(whole, config, task)
    return whole, "" if before is None or after is None else bleu_gate(before, after, tolerance=tolerance.bleu)


class Bleu(NamedTuple):
    """A score, and which rows it is of."""

    score: float
    rows: str


def bleu_of(model: Any, config: RunConfig, task: Task) -> Bleu | None:
    """On `rows_to_translate`, translated as the run does it; None if the task is not translation."""
    if not isinstance(task, TranslationTask):
        return None
    options = config.evaluation or EvaluationConfig()
    settings = beam_settings(config, task)
    max_tokens = options.max_tokens_per_device or config.batch.max_tokens_per_device
    name, rows = rows_to_translate(config)
    outputs = Translator(model, task, settings, max_tokens, model.device).of_rows(rows)
    texts = [one.outputs[0].text if one.outputs else "" for one in outputs]
    languages = {row.target_language for row in rows}
    language = languages.pop() if len(languages) == 1 else None
    scores = corpus_scores(texts, [row.target for row in rows], ["bleu"], target_language=language)
    return Bleu(scores.values["bleu"], f"{len(rows)} rows of {name}")


def rows_to_translate(config: RunConfig) -> tuple[str, list[Row]]:
    """Name and first rows of the run's validation set, else of its test set, else of what it was trained on."""
    name, source = next(iter(evaluation_sources(config).items()), ("train", config.data.train[0]))
    rows = (row for row in read_rows(source, config.data) if isinstance(row, Row))
    return name, list(islice(rows, NUM_ROWS))


def bleu_gate(unmerged: Bleu, merged: Bleu, *, tolerance: float) -> str:
    """Both scores in words. Raises DataError if they differ by more than `tolerance`."""
    comparison = f"BLEU of {merged.rows}: {unmerged.score:.2f} with the adapter, {merged.score:.2f} merged"
    if not abs(merged.score - unmerged.score) <= tolerance:
        what = f"merging changed more than {tolerance:g} points of BLEU ({comparison})"
        raise DataError(what, hint="export the adapter without merging")
    return comparison
