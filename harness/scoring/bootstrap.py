"""Bootstrap resampling of the rows of a test set (Koehn, EMNLP 2004, "Statistical Significance Tests for Machine
Translation Evaluation"), with the draws of sacreBLEU 2.6: its numbers, without its copy of the set for each resampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import estimate_ci

SEED = 12345  # sacreBLEU's, if SACREBLEU_SEED does not say otherwise


@dataclass(frozen=True)
class SentenceStatistics:
    """`counts` [rows, statistics] are what each row adds to a corpus score, which follows from their sum.

    BLEU: lengths, n-grams and matches; chrF: n-grams of both sides and matches; TER: edits and words of the reference.
    """

    metric: Metric
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> SentenceStatistics:
        return cls(metric, np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.int64))

    def score(self, rows: Sequence[int] | None = None) -> Any:
        """sacreBLEU's score of `rows` (default: all)."""
        counts = self.counts if rows is None else self.counts[list(rows)]
        return self.metric._compute_score_from_stats(counts.sum(axis=0).tolist())

    def resampled(self, num_samples: int) -> NDArray[np.float64]:
        """Scores [num_samples] of as many rows as there are, drawn with replacement; equal draws at each call."""
        generator, num_rows = np.random.default_rng(SEED), len(self.counts)
        scores = np.empty(num_samples)
        for sample in range(num_samples):
            times_drawn = np.bincount(generator.choice(num_rows, size=num_rows), minlength=num_rows)
            # sacreBLEU sums in float32; from there on its rounding decides the last digits.
            sums = (times_drawn @ self.counts).astype(np.float32)
            scores[sample] = self.metric._compute_score_from_stats(sums).score
        return scores


def confidence_interval(scores: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of resampled scores as sacreBLEU tells it: their mean, and half the distance of the outer ones
    to either side."""
    mean, half_width = estimate_ci(scores)
    return float(mean - half_width), float(mean + half_width)
