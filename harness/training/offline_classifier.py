"""A trained classifier outside of its run: texts in, answers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.config.schema import DataConfig
from harness.data.batches import cut_step
from harness.data.formats import Columns
from harness.data.readers import READERS, reader_of
from harness.data.rows import BadRow, Row
from harness.data.sources import existing_file
from harness.engine.processes import find_device
from harness.errors import ConfigError, DataError
from harness.io.atomic import read_json
from harness.reports.class_report import rounded
from harness.scoring.classification import answers, probabilities
from harness.tasks.classification import ClassificationTask
from harness.training.offline import load_for_inference
from harness.training.prepare import build_task
from harness.training.subject import Subject
from harness.training.validate import evaluation_directory

ANSWERS = {"single_label": "label", "multi_label": "labels", "regression": "value"}


class Answer(NamedTuple):
    """What `harness predict` writes of one text. `truncated`: its end was left out."""

    fields: dict[str, Any]
    truncated: bool


@dataclass(frozen=True)
class Classifier:
    """A model with everything that is the same for every text. `max_tokens` limits a batch: rows x longest."""

    model: Any
    task: ClassificationTask
    temperature: float
    max_tokens: int
    device: torch.device

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> list[Answer]:
        """The answer to each row, in order; their labels are not read."""
        encoded = self.task.encode_texts(rows)
        found: dict[int, Answer] = {}
        sizes = np.array([len(one.input_ids) for one in encoded])
        limit = max(self.max_tokens, int(sizes.max(initial=0)))
        batches = cut_step(np.arange(len(sizes)), sizes, max_tokens_per_device=limit, world_size=1) if rows else []
        for batch in (part.tolist() for [part] in batches):
            inputs = self.task.collate_texts([(encoded[i].input_ids, encoded[i].marker) for i in batch], self.device)
            logits = self.model(**inputs).logits.float().cpu().numpy()
            for index, fields in zip(batch, self._fields(logits), strict=True):
                found[index] = Answer(fields, encoded[index].truncated)
        return [found[index] for index in range(len(rows))]

    def _fields(self, logits_NK: Any) -> list[dict[str, Any]]:
        problem, labels = self.task.kind.problem, list(self.task.label_ids)
        scored_NK = probabilities(logits_NK, problem, self.temperature)
        fields = [{ANSWERS[problem]: answer} for answer in answers(scored_NK, labels, problem)]
        if problem == "regression":
            return fields
        return [one | {"probabilities": rounded(labels, row_K)} for one, row_K in zip(fields, scored_NK, strict=True)]


def open_classifier(subject: Subject, temperature: float | None) -> Classifier:
    """Everything to classify texts. Raises ConfigError if the model is no classifier.

    Without a `temperature` a run's is the one that suits its validation rows best, and any other model's is 1.
    """
    config, device = subject.config, find_device(0)
    if config.task != "classification":
        raise ConfigError(f"its task is {config.task}, not classification", where=subject.name)
    task = build_task(config)
    assert isinstance(task, ClassificationTask)
    model = load_for_inference(config, subject.adapter, device)
    max_tokens = config.batch.max_tokens_per_device
    return Classifier(model, task, temperature or fitted_temperature(subject), max_tokens, device)


def is_table(path: Path) -> bool:
    return any(suffix.lower() in READERS for suffix in path.suffixes[-2:])


def table_rows(path: Path, data: DataConfig) -> Iterator[Row]:
    """The texts of a table, without labels. Raises DataError for a row that cannot be read: each gets an answer."""

    def build(where: str, values: Sequence[Any]) -> Row:
        text, *second = values
        return Row(where, text, "", source_pair=second[0] if second else None)

    pair = (data.text_pair_column,) if data.text_pair_column else ()
    columns = Columns((data.text_column, *pair), (), "--text-column and --text-pair-column name the columns", build)
    for row in reader_of(path)(existing_file(path), columns):
        if isinstance(row, BadRow):
            raise DataError(f"{row.reason}: {row.detail}", where=row.where, hint="mend this row or delete it")
        yield row


def fitted_temperature(subject: Subject) -> float:
    """Of the validation rows at the step that was exported; 1 if there were none."""
    if subject.run_dir is None or subject.step is None:
        return 1.0
    scores = evaluation_directory(subject.run_dir, subject.step, "validation") / "scores.json"
    calibration = read_json(scores).get("calibration", {}) if scores.is_file() else {}
    return float(calibration.get("temperature", 1.0))
