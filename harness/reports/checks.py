"""Outputs that something may be wrong with: hints from the texts alone, each to be read before it is believed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

from harness.reports.diffs import words
from harness.reports.languages import Languages
from harness.reports.sentences import Sentences
from harness.scoring.buckets import LanguagePair

MIN_COPY = 0.8  # similarity of output and source that makes it a copy, and ...
MIN_COPY_GAIN = 0.3  # ... how much less the reference must be like the source
LENGTH_FACTOR = 2.0
EXTRA_CHARACTERS = 10  # added to both lengths: of a short text twice as long says little
REPEATED_WORDS, MIN_REPEATS = 4, 3
_LOOP = re.compile(r"(\w{1,8}?)\1{5,}")  # the same few characters six times or more
_END = re.compile(
    r"[.!?\u2026\u3002\uff01\uff1f\uff0e\u0964\u06d4\u061f][\"'\u2019\u201c\u201d\u00bb\u300d\u300f)\]]*$"
)


class Finding(NamedTuple):
    """Rows of one suspicion, the clearest first where that can be told. `method` says how they were found."""

    name: str
    title: str
    rows: list[int]
    method: str


def find_suspects(sentences: Sentences) -> list[Finding]:
    """Every check, also those that find nothing."""
    filled = [row for row, text in enumerate(sentences.hypotheses) if text.strip()]
    empty = sorted(set(range(len(sentences.hypotheses))) - set(filled))
    at_limit = [row for row in filled if sentences.outputs[row][0].is_at_limit]

    def where(is_suspect: Callable[[str, str, str], bool]) -> list[int]:
        """Rows by what source, reference and output are."""
        texts = sentences.sources, sentences.references, sentences.hypotheses
        return [row for row in filled if is_suspect(*(side[row] for side in texts))]

    return [
        Finding("empty", "Empty", empty, "Nothing but white space."),
        Finding(
            "copy", "Copy of the source", where(_is_copy),
            f"Output and source share at least {100 * MIN_COPY:.0f} % of their character trigrams (Dice), reference "
            "and source far fewer.",
        ),
        _wrong_language(sentences),
        *_wrong_length(sentences, filled),
        Finding(
            "at_limit", "At the length limit", at_limit,
            "As many tokens as the search allows an output of this source: it may have been cut off.",
        ),
        Finding(
            "no_end", "No end of the sentence", where(_lacks_end),
            "The reference ends as a sentence does, the output does not: it may have been cut off.",
        ),
        Finding(
            "repetition", "Repetition", where(lambda _, reference, output: repeats(output) and not repeats(reference)),
            f"The same {REPEATED_WORDS} words come {MIN_REPEATS} times or more, or the same few characters again and "
            "again, and not so in the reference.",
        ),
        Finding(
            "same_output", "Same output for different sources", list(_same_outputs(sentences)),
            "The references are different too.",
        ),
    ]  # fmt: skip


def similarity(ours: str, theirs: str) -> float:
    """Dice's coefficient of the character trigrams, in lower case: 1 for equal texts, 0 for nothing in common."""
    left, right = (
        Counter(text[at : at + 3] for at in range(len(text) - 2))
        for text in (f"  {ours.strip().lower()}  ", f"  {theirs.strip().lower()}  ")
    )
    return 2 * (left & right).total() / (left.total() + right.total())


def repeats(text: str) -> bool:
    """Whether the text goes round in a loop, as models do."""
    tokens = words(text.lower())
    runs = Counter(tuple(tokens[at : at + REPEATED_WORDS]) for at in range(len(tokens) - REPEATED_WORDS + 1))
    return max(runs.values(), default=0) >= MIN_REPEATS or _LOOP.search(text) is not None


def _is_copy(source: str, reference: str, output: str) -> bool:
    likeness = similarity(output, source)
    return likeness >= MIN_COPY and similarity(reference, source) <= likeness - MIN_COPY_GAIN


def _lacks_end(source: str, reference: str, output: str) -> bool:
    return bool(_END.search(reference.rstrip())) and not _END.search(output.rstrip())


def _wrong_length(sentences: Sentences, filled: list[int]) -> Iterator[Finding]:
    ratios = {
        row: (len(sentences.hypotheses[row]) + EXTRA_CHARACTERS) / (len(sentences.references[row]) + EXTRA_CHARACTERS)
        for row in filled
    }
    usual = median(ratios.values() or [1.0])
    rows = sorted(filled, key=lambda row: ratios[row])
    short = [row for row in rows if ratios[row] < usual / LENGTH_FACTOR]
    long = [row for row in reversed(rows) if ratios[row] > usual * LENGTH_FACTOR]
    note = f"usual in this set: {usual:.2f} characters for each of the reference."
    yield Finding("too_short", "Much too short", short, f"Less than half the usual length; {note}")
    yield Finding("too_long", "Much too long", long, f"More than twice the usual length; {note}")


def _same_outputs(sentences: Sentences) -> Iterator[int]:
    """Rows that share their output with another source and reference; the most frequent output first."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(sentences.hypotheses):
        if text.strip():
            rows_of[text.strip()].append(row)
    for rows in sorted(rows_of.values(), key=len, reverse=True):
        if all(len({side[row] for row in rows}) > 1 for side in (sentences.sources, sentences.references)):
            yield from rows


def _wrong_language(sentences: Sentences) -> Finding:
    """Its method says how well it does on the sources and references of this very set."""
    rows_of: dict[LanguagePair, list[int]] = defaultdict(list)
    for row in range(len(sentences.hypotheses)):
        rows_of[sentences.pairs[row] if sentences.pairs else (None, None)].append(row)
    found, shares = [], []
    for rows in rows_of.values():
        sides = ([side[row] for row in rows] for side in (sentences.sources, sentences.references))
        languages = Languages(*sides)
        found += [row for place, row in enumerate(rows) if languages.is_wrong(place, sentences.hypotheses[row])]
        if languages.are_told_apart:
            shares.append(min(languages.told_apart))
    method = "A hint, not language identification. Letters of another script than the references have"
    if shares:
        method += (
            "; or, in the same script, character trigrams that are more usual in the sources of this set than in its "
            f"references. Of these texts themselves this tells {100 * min(shares):.1f} % or more correctly"
        )
    if len(shares) < len(rows_of):
        some = "some pairs of languages" if shares else "this set"
        method += f". In one script the two sides of {some} are not told apart: too little text, or too much alike"
    return Finding("wrong_language", "Wrong language", sorted(found), f"{method}.")
