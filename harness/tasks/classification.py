"""Classification: a text, or two, becomes a label, several labels, or a number.

Shapes: B rows, S positions, K labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from harness.config.schema import ClassificationConfig, LossConfig, RunConfig
from harness.data.encoded import Encoded
from harness.data.rows import Row, nearest_name
from harness.errors import ConfigError, DataError
from harness.models.heads import label_names
from harness.models.load import model_directory
from harness.objectives.classification import multi_label_loss, regression_loss, single_label_loss
from harness.objectives.cross_entropy import LossTerms
from harness.tasks.task import Batch, Example, Task, Tokens, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEGMENTS = "token_type_ids"


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Rows and labels of one tokeniser; the labels' order is that of the logits."""

    tokenizer: PreTrainedTokenizerBase
    kind: ClassificationConfig
    max_length: int
    objective: LossConfig
    class_weights: tuple[float, ...] | None
    has_segments: bool

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> ClassificationTask:
        """The task of a run file whose labels and class weights are known (`with_labels_of`).

        A tokeniser without a padding token gets its end token for that. Raises ConfigError if `loss.class_weights`
        names an unknown label.
        """
        kind = config.classification or ClassificationConfig()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        directory = model_directory(config.model.path or config.model.config or "")
        model = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        has_segments = SEGMENTS in tokenizer.model_input_names and (getattr(model, "type_vocab_size", None) or 0) > 1
        return cls(tokenizer, kind, config.data.max_length, config.loss, _weights(config.loss, kind), has_segments)

    @cached_property
    def label_ids(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(label_names(self.kind))}

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Token ids with the tokeniser's own special tokens, and labels: an id, K times 0 or 1, or a number.

        A pair that is too long loses tokens at the end of its longer side. Raises DataError for an unknown label.
        """
        found = self.encode_texts(rows)
        return [
            Encoded(one.input_ids, self._labels(row), one.marker, one.truncated, num_targets=1)
            for row, one in zip(rows, found, strict=True)
        ]

    def encode_texts(self, rows: Sequence[Row]) -> list[Encoded]:
        """`encode` without the labels. The marker is where the second segment starts, 0 if there is none."""
        encoded = self._tokens(rows)
        long = [index for index, one in enumerate(encoded) if len(one.input_ids) > self.max_length]
        cut = self._tokens([rows[i] for i in long], truncation="longest_first", max_length=self.max_length)
        for index, one in zip(long, cut, strict=True):
            encoded[index] = replace(one, truncated=True)
        return encoded

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Pad (input_ids, labels, marker) examples on the right; no examples give an empty text without a label."""
        inputs = self.collate_texts([(ids, marker) for ids, _, marker in examples] or [(self._empty, 0)], device)
        num_tokens = sum(len(ids) for ids, _, _ in examples)
        padded = len(examples) * inputs["input_ids"].shape[1]
        return Batch(inputs, torch.from_numpy(self.gold(examples)).to(device), padded, num_tokens)

    def collate_texts(self, texts: Sequence[tuple[Tokens, int]], device: torch.device) -> dict[str, Tensor]:
        """What the model reads of (input_ids, marker) texts: its keyword arguments."""
        input_ids_BS = pad([ids for ids, _ in texts], self.tokenizer.pad_token_id)
        mask_BS = pad([[1] * len(ids) for ids, _ in texts], 0)
        inputs = {"input_ids": input_ids_BS, "attention_mask": mask_BS}
        if self.has_segments:
            starts_B = torch.tensor([marker or len(ids) for ids, marker in texts])
            inputs[SEGMENTS] = mask_BS * (torch.arange(mask_BS.shape[1]) >= starts_B[:, None])
        return {name: value.to(device) for name, value in inputs.items()}

    def gold(self, examples: Sequence[Example]) -> NDArray[Any]:
        """Label ids or numbers [B], or zeros and ones [B, K], of the examples."""
        labels = [labels for _, labels, _ in examples]
        if self.kind.problem == "multi_label":
            return np.array(labels, dtype=np.int64).reshape(len(labels), len(self.label_ids))
        return np.array(labels, np.float32 if self.kind.problem == "regression" else np.int64).reshape(len(labels))

    def loss(self, logits: Tensor, batch: Batch) -> LossTerms:
        """Sums over rows; a row counts once whatever its weight and number of labels."""
        if self.kind.problem == "regression":
            return regression_loss(logits, batch.labels)
        objective = single_label_loss if self.kind.problem == "single_label" else multi_label_loss
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=logits.device)
        return objective(
            logits,
            batch.labels,
            epsilon=self.objective.label_smoothing,
            convention=self.objective.convention,
            gamma=self.objective.focal_gamma,
            weights_K=weights,
        )

    def made_up(self, token_ids: Sequence[list[int]]) -> list[Example]:
        """An encoder-decoder reads its last end token, and wants equally many of them in every row."""
        end = self.tokenizer.eos_token_id
        inputs = token_ids if end is None else [[*(id for id in ids if id != end), end] for ids in token_ids]
        width = len(self.label_ids) if self.kind.problem == "multi_label" else 1
        return [(ids, [0] * width, 0) for ids in inputs]

    def show(self, row: Row) -> str:
        """One row as the model will see it, token by token."""
        (encoded,) = self.encode([row])
        cut = encoded.marker or len(encoded.input_ids)
        parts = {"text": encoded.input_ids[:cut], "second": encoded.input_ids[cut:]}
        lines = {name: " ".join(self.tokenizer.convert_ids_to_tokens(ids)) for name, ids in parts.items() if ids}
        shown = ", ".join(names_of(row.target, self.kind.problem)) or "none"
        lines["label"] = f"{shown} -> {' '.join(map(str, encoded.labels))}"
        width = max(map(len, lines))
        return "\n".join(f"{name:>{width}}: {text}" for name, text in lines.items())

    def _tokens(self, rows: Sequence[Row], **options: Any) -> list[Encoded]:
        if not rows:
            return []
        texts = [self._plain(row.source) for row in rows]
        seconds = [self._plain(row.source_pair) for row in rows if row.source_pair is not None]
        found = self.tokenizer(texts, seconds or None, return_token_type_ids=True, verbose=False, **options)
        return [
            Encoded(ids or self._empty, [], segments.index(1) if 1 in segments else 0)
            for ids, segments in zip(found["input_ids"], found[SEGMENTS], strict=True)
        ]

    def _plain(self, text: str) -> str:
        """The end token is never part of a text: an encoder-decoder's head counts them."""
        end = self.tokenizer.eos_token
        return text.replace(end, " ") if end else text

    @cached_property
    def _empty(self) -> list[int]:
        """What the tokeniser makes of no text, or its end token where that is nothing."""
        return list(self.tokenizer("")["input_ids"]) or [self.tokenizer.eos_token_id]

    def _labels(self, row: Row) -> list[int] | list[float]:
        names = names_of(row.target, self.kind.problem)
        if self.kind.problem == "regression":
            return [_number(row)]
        for name in names:
            if name not in self.label_ids:
                hint = nearest_name(name, self.label_ids) or f"the labels are {', '.join(self.label_ids)}"
                raise DataError(f"there is no label {name!r}", where=row.where, hint=hint)
        ids = {self.label_ids[name] for name in names}
        return [int(id in ids) for id in self.label_ids.values()] if self.kind.problem == "multi_label" else list(ids)


def names_of(target: str, problem: str) -> list[str]:
    """The labels that a row names: parted by commas where it may have several, without white space around them."""
    if problem != "multi_label":
        return [target.strip()]
    return [name for part in target.split(",") if (name := part.strip())]


def balanced_weights(targets: Sequence[str], labels: Sequence[str], problem: str) -> dict[str, float]:
    """n / (K n_k) of each label: n rows, n_k of them with label k (scikit-learn's `balanced`).

    Raises DataError for a label that no row has.
    """
    counts = Counter(name for target in targets for name in set(names_of(target, problem)))
    if missing := [label for label in labels if not counts[label]]:
        what = f"no training row has the label {missing[0]!r}: it cannot be balanced"
        raise DataError(
            what, where="loss.class_weights", hint="name the weights, or take it out of classification.labels"
        )
    return {label: len(targets) / (len(labels) * counts[label]) for label in labels}


def with_labels_of(config: RunConfig, rows: Iterable[Row]) -> RunConfig:
    """The run file with what it leaves to the training rows written in: labels, and weights of balanced classes."""
    kind = config.classification or ClassificationConfig()
    if kind.problem == "regression":
        return config.model_copy(update={"classification": kind})
    targets = [row.target for row in rows if row.target.strip()]
    labels = kind.labels or sorted({name for target in targets for name in names_of(target, kind.problem)})
    loss = config.loss
    if loss.class_weights == "balanced":
        loss = loss.model_copy(update={"class_weights": balanced_weights(targets, labels, kind.problem)})
    return config.model_copy(update={"classification": kind.model_copy(update={"labels": labels}), "loss": loss})


def _weights(loss: LossConfig, kind: ClassificationConfig) -> tuple[float, ...] | None:
    """In the order of the labels; a label that is not named weighs 1."""
    if loss.class_weights is None:
        return None
    assert isinstance(loss.class_weights, dict), "balanced weights come from the training rows: with_labels_of"
    labels = label_names(kind)
    for name in loss.class_weights:
        if name not in labels:
            hint = nearest_name(name, labels) or f"the labels are {', '.join(labels)}"
            raise ConfigError(f"there is no label {name!r}", where="loss.class_weights", hint=hint)
    return tuple(loss.class_weights.get(name, 1.0) for name in labels)


def _number(row: Row) -> float:
    try:
        value = float(row.target)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"the label {row.target!r} is not a number", where=row.where)
    return value
