"""An evaluation beside an earlier one of the same rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.reports.sentences import Sentences
from harness.scoring.scores import Scores, one_line, sentence_chrf
from harness.scoring.significance import Difference, WrittenEvaluation, check_same_rows, paired_bootstrap

_NAME = re.compile(r"step-(\d+)-(.+)")


@dataclass(frozen=True)
class Changes:
    """What is different from `baseline`. `gains` are chrF2 of the new output less that of the old one, by row."""

    baseline: WrittenEvaluation
    changed: list[int]
    gains: list[float]
    differences: dict[str, Difference]

    @classmethod
    def since(cls, baseline: WrittenEvaluation, sentences: Sentences, scores: Scores) -> Changes:
        """Metrics are compared where both evaluations have the same signature."""
        before = sentence_chrf(baseline.hypotheses, baseline.references)
        pairs = zip(baseline.hypotheses, sentences.hypotheses, strict=True)
        signatures, language = baseline.scores.get("signatures", {}), scores.target_language
        shared = [name for name, signature in scores.signatures.items() if signatures.get(name) == signature]
        return cls(
            baseline,
            [row for row, (old, new) in enumerate(pairs) if old != new],
            [new - old for old, new in zip(before, sentences.chrf, strict=True)],
            {name: paired_bootstrap(baseline.statistics(name, language), scores.statistics[name]) for name in shared},
        )

    @cached_property
    def better(self) -> list[int]:
        """Rows, the largest gain first."""
        return sorted((row for row in self.changed if self.gains[row] > 0), key=lambda row: -self.gains[row])

    @cached_property
    def worse(self) -> list[int]:
        """Rows, the largest loss first."""
        return sorted((row for row in self.changed if self.gains[row] < 0), key=lambda row: self.gains[row])

    def to_json(self) -> dict[str, Any]:
        counts = {"changed": len(self.changed), "better": len(self.better), "worse": len(self.worse)}
        scores = {
            name: {"score": one.baseline, "delta": one.delta, "interval": list(one.interval), "p": one.p}
            for name, one in self.differences.items()
        }
        return {"name": self.baseline.directory.name, **counts, "scores": scores}


def read_baseline(directory: Path, references: Sequence[str]) -> WrittenEvaluation:
    """Raises DataError unless the directory has outputs and scores for rows with these references."""
    found = WrittenEvaluation.read(directory)
    check_same_rows(found, [one_line(text) for text in references], "the rows to be scored")
    if not found.scores:
        raise DataError("has no scores.json", where=str(directory))
    return found


def earlier_evaluation(directory: Path, references: Sequence[str]) -> WrittenEvaluation | None:
    """The newest one of an earlier step beside `directory`, of the same set and rows; None if there is none."""
    ours = _NAME.fullmatch(directory.name)
    if ours is None or not directory.parent.is_dir():
        return None
    for path in sorted(directory.parent.iterdir(), reverse=True):
        other = _NAME.fullmatch(path.name)
        if other and other[2] == ours[2] and int(other[1]) < int(ours[1]):
            try:
                return read_baseline(path, references)
            except DataError:
                continue
    return None
