"""The texts of a decoded set, as files and page hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.scoring.buckets import LanguagePair
from harness.scoring.scores import one_line, sentence_chrf
from harness.tasks.task import Output


@dataclass(frozen=True)
class Sentences:
    """One line each, row i at index i. `outputs` are the n best of each row, best first.

    `pairs` are source and target language of each row; nothing where they are not known.
    """

    sources: list[str]
    references: list[str]
    outputs: list[list[Output]]
    pairs: list[LanguagePair]

    @classmethod
    def of(
        cls,
        sources: Sequence[str],
        references: Sequence[str],
        outputs: Sequence[Sequence[Output]],
        pairs: Sequence[LanguagePair] = (),
    ) -> Sentences:
        """Line breaks inside a text become spaces."""
        return cls(
            [one_line(text) for text in sources],
            [one_line(text) for text in references],
            [[one._replace(text=one_line(one.text)) for one in best] for best in outputs],
            list(pairs),
        )

    @cached_property
    def hypotheses(self) -> list[str]:
        return [best[0].text for best in self.outputs]

    @cached_property
    def chrf(self) -> list[float]:
        """chrF2 of each sentence."""
        return sentence_chrf(self.hypotheses, self.references)
