"""Is an output in the language of the references? A hint, from nothing but the texts of the set itself.

Each output is judged by its script where that differs, else by its character trigrams: whether they are more usual in
the sources or in the references. Nothing is known of a language that the set does not have.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property

MIN_LETTERS = 8  # of a text that can be judged
MIN_SCRIPT_OVERLAP = 0.5
MIN_TRIGRAMS = 2000  # of each side of a set, to be told apart
MIN_TOLD_APART = 0.9  # of the texts of each side must fall on their own side
MIN_EVIDENCE = 6.0  # nats by which the trigrams of an output must be likelier in the sources
_KANA = {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}  # the last is the mark of a long vowel


class Languages:
    """The two sides of rows of one pair of languages, texts at equal indices belonging together.

    A text is judged without what its own row adds to the trigrams of the set.
    """

    def __init__(self, sources: Sequence[str], references: Sequence[str]) -> None:
        self._texts = sources, references
        self._own = [[trigrams(text) for text in side] for side in self._texts]
        self._all = [_sum(side) for side in self._own]
        self._totals = [side.total() for side in self._all]
        self._num_kinds = len(self._all[0].keys() | self._all[1].keys())
        self._scripts = script_shares(" ".join(references))

    def is_wrong(self, row: int, hypothesis: str) -> bool:
        reference = self._texts[1][row]
        if not self._scripts or sum(map(str.isalpha, hypothesis)) < MIN_LETTERS:
            return False
        found = script_shares(hypothesis)
        if max(_overlap(found, script_shares(reference)), _overlap(found, self._scripts)) < MIN_SCRIPT_OVERLAP:
            return True
        if not self.are_told_apart:
            return False
        evidence = self.evidence(row, hypothesis)
        return evidence < -MIN_EVIDENCE and evidence < self.evidence(row, reference) - MIN_EVIDENCE

    @cached_property
    def told_apart(self) -> tuple[float, float]:
        """Share of the sources and of the references that trigrams put on their own side; 0 for too little text."""
        if min(self._totals) < MIN_TRIGRAMS:
            return 0.0, 0.0
        rows = range(len(self._texts[0]))
        sources, references = ([self.evidence(row, side[row]) for row in rows] for side in self._texts)
        return sum(one < 0 for one in sources) / len(rows), sum(one > 0 for one in references) / len(rows)

    @property
    def are_told_apart(self) -> bool:
        return min(self.told_apart) >= MIN_TOLD_APART

    def evidence(self, row: int, text: str) -> float:
        """log P(trigrams | references) - log P(trigrams | sources), each kind counted once, with add-one smoothing."""
        (own_source, own_reference), (source, reference) = (side[row] for side in self._own), self._all
        totals = [total - own.total() for total, own in zip(self._totals, (own_source, own_reference), strict=True)]
        bias = math.log((totals[0] + self._num_kinds) / (totals[1] + self._num_kinds))
        return sum(
            math.log((reference[kind] - own_reference[kind] + 1) / (source[kind] - own_source[kind] + 1)) + bias
            for kind in trigrams(text)
        )


def trigrams(text: str) -> Counter[str]:
    """Counts of the character trigrams of the words, in lower case, with a space before and after each word."""
    return Counter(
        padded[start : start + 3]
        for word in _letters(text).split()
        for padded in [f" {word} "]
        for start in range(len(padded) - 2)
    )


def script_shares(text: str) -> Counter[str]:
    """Share of each script among the letters: LATIN, CYRILLIC, CJK, ..., by the Unicode name; KANA is both of them."""
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    total = counts.total()
    return Counter({script: count / total for script, count in counts.items()})


@cache
def _script(letter: str) -> str:
    script = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "?").split()[0]
    return "KANA" if script in _KANA else script


@cache
def _is_letter(character: str) -> bool:
    """Or a mark on one, as the vowels of many scripts are."""
    return unicodedata.category(character)[0] in "LM"


def _overlap(ours: Counter[str], theirs: Counter[str]) -> float:
    return sum(min(share, theirs[script]) for script, share in ours.items())


def _letters(text: str) -> str:
    return "".join(letter if _is_letter(letter) else " " for letter in text.lower())


def _sum(parts: Sequence[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
