"""Minimum Bayes risk: of several samples of one row, the one that is expected to score best against all of them.

Kumar and Byrne 2004; with samples as candidates and as references alike: Eikema and Aziz 2020, equation 6. The utility
is sacreBLEU's sentence score with its defaults. Each sample's n-grams are counted once.

Shapes: D distinct samples, G distinct n-grams of one order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams, extract_all_word_ngrams

from harness.scoring.scores import bleu_tokenizer

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def rank_by_risk(
    samples: Sequence[str], utility: Literal["chrf", "bleu"], language: str | None = None
) -> list[tuple[str, float]]:
    """The distinct samples with their expected utility (0 to 100), best first; of equals the one drawn first.

    A sample counts as often as it was drawn. `language` picks BLEU's tokeniser.
    """
    drawn = Counter(samples)
    texts, weights = list(drawn), np.array(list(drawn.values())) / len(samples)
    scores_DD = _chrf(texts) if utility == "chrf" else _bleu(texts, bleu_tokenizer(language))
    expected_D = scores_DD @ weights
    return [(texts[place], float(expected_D[place])) for place in np.argsort(-expected_D, kind="stable")]


def _chrf(texts: Sequence[str]) -> Floats:
    """chrF2 [D, D] of each text against each."""
    grams = [extract_all_char_ngrams(text, CHRF.CHAR_ORDER, False) for text in texts]
    precision_DD, recall_DD, num_orders_DD = np.zeros((3, len(texts), len(texts)))
    for order in range(CHRF.CHAR_ORDER):
        matches_DD, totals_D = _matches([counters[order] for counters in grams])
        counts_DD = (totals_D[:, None] > 0) & (totals_D > 0)  # orders that a text is too short for do not
        num_orders_DD += counts_DD
        precision_DD += matches_DD / totals_D.clip(min=1)[:, None] * counts_DD
        recall_DD += matches_DD / totals_D.clip(min=1) * counts_DD
    factor = CHRF.BETA**2
    sides_DD = (factor * precision_DD + recall_DD) * num_orders_DD.clip(min=1)
    scores_DD: Floats = np.zeros_like(sides_DD)
    np.divide(100 * (1 + factor) * precision_DD * recall_DD, sides_DD, out=scores_DD, where=sides_DD > 0)
    return scores_DD


def _bleu(texts: Sequence[str], tokenizer: str) -> Floats:
    """Sentence BLEU [D, D] of each text against each, its n-grams as long as there are some."""
    metric = BLEU(tokenize=tokenizer, effective_order=True)
    counted = [extract_all_word_ngrams(metric.tokenizer(text.rstrip()), 1, metric.max_ngram_order) for text in texts]
    lengths = [length for _, length in counted]
    orders = [
        _matches([Counter({gram: num for gram, num in grams.items() if len(gram) == order}) for grams, _ in counted])
        for order in range(1, metric.max_ngram_order + 1)
    ]
    scores_DD = np.zeros((len(texts), len(texts)))
    for row, column in np.ndindex(*scores_DD.shape):
        scores_DD[row, column] = metric.compute_bleu(
            [int(matches_DD[row, column]) for matches_DD, _ in orders], [int(totals_D[row]) for _, totals_D in orders],
            lengths[row], lengths[column],
            smooth_method=metric.smooth_method, smooth_value=metric.smooth_value, effective_order=True,
        ).score  # fmt: skip
    return scores_DD


def _matches(counters: Sequence[Counter[Any]]) -> tuple[Counts, Counts]:
    """Common n-grams [D, D] of each text with each, and the n-grams [D] of each."""
    places = {gram: place for place, gram in enumerate(dict.fromkeys(gram for grams in counters for gram in grams))}
    counts_DG = np.zeros((len(counters), len(places)), dtype=np.int64)
    for row, grams in enumerate(counters):
        counts_DG[row, [places[gram] for gram in grams]] = list(grams.values())
    matches_DD = np.stack([np.minimum(counts_G, counts_DG).sum(axis=1) for counts_G in counts_DG])
    return matches_DD, counts_DG.sum(axis=1)
