"""Scores of parts of a set: by the length of the source, and by pair of languages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.scoring.bootstrap import SentenceStatistics
from harness.scoring.scores import corpus_scores

NUM_LENGTH_GROUPS = 4
MIN_GROUP_SENTENCES = 10
LanguagePair = tuple[str | None, str | None]  # source, target


def by_length(
    sources: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    statistics: Mapping[str, SentenceStatistics],
) -> list[dict[str, Any]]:
    """Scores of the rows in groups of about equal size, short sources to long.

    `from` and `to` are source characters; `length_ratio` is characters of the outputs for each of the references.
    """
    groups = []
    for rows in length_groups([len(source) for source in sources]):
        num_characters = [sum(len(texts[row]) for row in rows) for texts in (hypotheses, references)]
        groups.append({
            "from": len(sources[rows[0]]),
            "to": len(sources[rows[-1]]),
            "sentences": len(rows),
            **{name: float(one.score(rows).score) for name, one in statistics.items()},
            "length_ratio": num_characters[0] / max(1, num_characters[1]),
        })  # fmt: skip
    return groups


def length_groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row ids in up to four groups of about equal size, short to long; rows of one length stay together."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    num_groups = max(1, min(NUM_LENGTH_GROUPS, len(order) // MIN_GROUP_SENTENCES))
    limits = sorted({lengths[order[len(order) * (group + 1) // num_groups - 1]] for group in range(num_groups)})
    for low, high in zip([-1, *limits], limits, strict=False):
        yield [row for row in order if low < lengths[row] <= high]


def by_language(
    pairs: Sequence[LanguagePair], references: Sequence[str], hypotheses: Sequence[str], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Scores of each pair of languages, most rows first; nothing if there is only one.

    BLEU has the tokeniser of the target language, so each pair has its signatures.
    """
    rows_of: dict[LanguagePair, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        rows_of[pair].append(row)
    if len(rows_of) < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for (source, target), rows in sorted(rows_of.items(), key=lambda item: -len(item[1])):
        texts = [hypotheses[row] for row in rows], [references[row] for row in rows]
        scores = corpus_scores(*texts, metrics, target_language=target)
        name = f"{source or '?'}-{target or '?'}"
        found[name] = {"sentences": len(rows), **scores.values, "signatures": scores.signatures}
    return found
