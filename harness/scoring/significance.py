"""Are two models different, or only their scores? Paired bootstrap resampling of the outputs for the same rows.

The p-values are those of `sacrebleu --paired-bs` (Koehn, EMNLP 2004; Graham et al., WMT 2014, "Randomized Significance
Tests in Machine Translation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sacrebleu.significance import _compute_p_value

from harness.errors import DataError
from harness.io.atomic import read_json
from harness.scoring.bootstrap import SentenceStatistics, confidence_interval
from harness.scoring.scores import METRICS, sentence_statistics

NUM_RESAMPLES = 1000  # no p can be below 1 / 1001


class Difference(NamedTuple):
    """Two corpus scores; `interval` is the 95 % one of `score - baseline`."""

    baseline: float
    score: float
    interval: tuple[float, float]
    p: float

    @property
    def delta(self) -> float:
        return self.score - self.baseline


def paired_bootstrap(baseline: SentenceStatistics, system: SentenceStatistics) -> Difference:
    """Both score the same rows by the same metric.

    p: how often the size of a resampled difference is further above the mean size than the real one is above zero.
    Where nearly all resampled ones have one sign this is the p of a one-sided test: of pairs of equals about one in ten
    has a p below 0.05, half of them in each direction. Outputs that are all the same have a p of 1 (sacreBLEU: 0.001).
    """
    baseline_score, score = float(baseline.score().score), float(system.score().score)
    differences = system.resampled(NUM_RESAMPLES) - baseline.resampled(NUM_RESAMPLES)
    sizes = abs(differences)
    p = _compute_p_value(sizes - sizes.mean(), abs(score - baseline_score)) if differences.any() else 1.0
    return Difference(baseline_score, score, confidence_interval(differences), p)


@dataclass(frozen=True)
class WrittenEvaluation:
    """The texts of an evaluation's directory, row i at index i; `scores` is its scores.json, or nothing."""

    directory: Path
    hypotheses: list[str]
    references: list[str]
    scores: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> WrittenEvaluation:
        """Raises DataError if a file is missing or the numbers of their lines differ."""
        hypotheses, references = (_lines(directory / f"{name}.txt") for name in ("hypotheses", "references"))
        if len(hypotheses) != len(references) or not hypotheses:
            what = f"{len(hypotheses)} hypotheses for {len(references)} references"
            raise DataError(what, where=str(directory))
        path = directory / "scores.json"
        return cls(directory, hypotheses, references, read_json(path) if path.is_file() else {})

    @property
    def metrics(self) -> list[str]:
        """The metrics of texts that it was scored with; BLEU and chrF if nothing says which."""
        return [name for name in METRICS if name in self.scores] if self.scores else ["bleu", "chrf"]

    def statistics(self, metric: str, target_language: str | None) -> SentenceStatistics:
        return sentence_statistics(metric, self.hypotheses, self.references, target_language=target_language)


def compare_written(baseline: WrittenEvaluation, system: WrittenEvaluation) -> dict[str, Difference]:
    """By name of the metrics that both have. Raises DataError if there is none, or if rows or signatures differ.

    Outputs without scores.json are scored as the other ones.
    """
    check_same_rows(baseline, system.references, str(system.directory))
    shared = [name for name in baseline.metrics if name in system.metrics]
    if not shared:
        raise DataError(f"it has no score that {baseline.directory} has", where=str(system.directory))
    for name in shared:
        ours, theirs = (one.scores.get("signatures", {}).get(name) for one in (baseline, system))
        if None not in (ours, theirs) and ours != theirs:
            raise DataError(f"{name} was scored as {theirs}, not {ours}", where=str(system.directory))
    language = (baseline.scores or system.scores).get("target_language")
    return {
        name: paired_bootstrap(baseline.statistics(name, language), system.statistics(name, language))
        for name in shared
    }


def check_same_rows(baseline: WrittenEvaluation, references: Sequence[str], where: str) -> None:
    """Raises DataError unless the outputs of `baseline` are for the rows of these references (one line each)."""
    if baseline.references != references:
        what = f"its rows are not those of {baseline.directory}: the references differ"
        raise DataError(what, where=where, hint="outputs for the same rows are compared, in the same order")


def num_changed(baseline: WrittenEvaluation, system: WrittenEvaluation) -> int:
    return sum(one != other for one, other in zip(baseline.hypotheses, system.hypotheses, strict=True))


def _lines(path: Path) -> list[str]:
    """Raises DataError."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot be read: {why}", where=str(path)) from error
