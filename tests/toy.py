"""A model of six tokens for tests of the search: log p of the next token follows from the two before it."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.decoding.beams import Beams
from harness.decoding.search import Rule

VOCABULARY, END, LONGEST = 6, 0, 5
Output = tuple[float, tuple[int, ...]]  # score, tokens with the one that ends it


class Toy:
    """Tables at random."""

    def __init__(self, seed: int) -> None:
        logits = torch.randn(VOCABULARY + 1, VOCABULARY + 1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.log_p = (1.5 * logits).log_softmax(-1)

    def after(self, tokens: tuple[int, ...]) -> Tensor:
        before = (VOCABULARY, VOCABULARY, *tokens)
        return self.log_p[before[-2], before[-1]]

    def continuations(self, running: list[Output], num: int, *, only_end: bool = False) -> list[Output]:
        """The likeliest (log p, tokens) that are one token longer."""
        tokens = [END] if only_end else range(VOCABULARY)
        longer = [(total + float(self.after(one)[token]), (*one, token)) for total, one in running for token in tokens]
        return sorted(longer, reverse=True)[:num]


def search(toy: Toy, num_outputs: int, rule: Rule, num_sentences: int = 1) -> list[list[Output]]:
    """The outputs that each sentence ends with, best first; junk in free places is left out."""
    none = torch.zeros(num_sentences, 0, dtype=torch.long)
    rows_R = torch.arange(num_sentences)
    beams = Beams.begin(
        none, torch.full((num_sentences,), LONGEST), num_outputs, LONGEST,
        rows_R=rows_R, before_RC=none, num_groups=rule.num_groups,
    )  # fmt: skip
    while bool(beams.is_open.any()):
        outputs, lengths = beams.tokens_RNL.tolist(), beams.length_R.tolist()
        rows = [[toy.after(tuple(one[:n])) for one in row] for row, n in zip(outputs, lengths, strict=True)]
        log_p_RNV = torch.stack([torch.stack(row) for row in rows])
        if rule.preset.forces_end and lengths[0] + 1 == LONGEST:
            log_p_RNV[:, :, END + 1 :] = -torch.inf
        rule.advance(beams, log_p_RNV)
    found = []
    for row in range(num_sentences):
        columns = (beams.best_score_RN[row], beams.best_RNL[row], beams.best_length_RN[row], beams.is_full_RN[row])
        parts = zip(*(column.tolist() for column in columns), strict=True)
        found.append([(score, tuple(tokens[:length])) for score, tokens, length, is_full in parts if is_full])
    return found
