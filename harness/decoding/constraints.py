"""What an output may not say, in the arithmetic and order of transformers 5.23's logits processors.

Shapes: R sentences, N running outputs of each, C tokens before the outputs, L output tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from harness.decoding.beams import NOTHING, Beams


@dataclass(frozen=True)
class Constraints:
    """`min_length` counts output tokens before </s>, `min_length_ratio` as a multiple of the row's own source.
    `no_repeat_ngram`: no sequence of so many tokens comes twice. `repetition_penalty` > 1 makes what was there before
    less likely. `bad_words` are token sequences.

    What was there before is the output and the decoder's start or prompt, as Hugging Face counts it.
    """

    min_length: int = 0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length_ratio: float | None = None

    def shortest(self, sizes_R: Tensor) -> Tensor:
        """Output tokens before an end of R sources of `sizes_R` tokens."""
        return (sizes_R * (self.min_length_ratio or 0.0)).long().clamp(min=self.min_length)

    def __call__(self, scores_RNV: Tensor, beams: Beams, ends: tuple[int, ...]) -> Tensor:
        """Scores of what may come next; -inf for what may not."""
        if self.repetition_penalty != 1.0:
            scores_RNV = self._penalised(scores_RNV, _history(beams))
        if self.no_repeat_ngram:
            scores_RNV = _without_repeats(scores_RNV, _history(beams), self.no_repeat_ngram)
        if single := [words[0] for words in self.bad_words if len(words) == 1]:
            scores_RNV = scores_RNV.index_fill(2, torch.tensor(single, device=scores_RNV.device), -torch.inf)
        for words in self.bad_words:
            if len(words) > 1:
                scores_RNV = _without(scores_RNV, _history(beams), words)
        if self.min_length or self.min_length_ratio:
            is_short_R = beams.length_R < beams.shortest_R
            banned_V = torch.zeros(scores_RNV.shape[2], dtype=torch.bool, device=scores_RNV.device)
            banned_V[list(ends)] = True
            scores_RNV = scores_RNV.masked_fill(is_short_R[:, None, None] & banned_V, -torch.inf)
        return scores_RNV

    def _penalised(self, scores_RNV: Tensor, history: Tensor) -> Tensor:
        vocabulary = scores_RNV.shape[2]
        padded = functional.pad(scores_RNV, (0, 1))
        index = history.masked_fill(history == NOTHING, vocabulary)
        seen = padded.gather(2, index)
        seen = torch.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
        return padded.scatter(2, index, seen)[:, :, :vocabulary]


def _history(beams: Beams) -> Tensor:
    """[R, N, C + L]: the tokens before each next one, the last of them at the end, NOTHING before the first."""
    num_outputs, room = beams.tokens_RNL.shape[1:]
    whole = torch.cat([beams.before_RC.unsqueeze(1).expand(-1, num_outputs, -1), beams.tokens_RNL], dim=2)
    width = whole.shape[2]
    place_RW = torch.arange(width, device=whole.device) - (room - beams.length_R).unsqueeze(1)
    shifted = whole.gather(2, place_RW.clamp(min=0).unsqueeze(1).expand_as(whole))
    return shifted.masked_fill((place_RW < 0).unsqueeze(1), NOTHING)


def _without_repeats(scores_RNV: Tensor, history: Tensor, size: int) -> Tensor:
    """Without the tokens that would complete a sequence of `size` tokens a second time."""
    if history.shape[2] < size:
        return scores_RNV
    windows = history.unfold(2, size, 1)
    start = history[:, :, history.shape[2] - size + 1 :].unsqueeze(2)
    repeats = (windows[..., :-1] == start).all(dim=3) & (windows != NOTHING).all(dim=3)
    return _banned(scores_RNV, windows[..., -1].masked_fill(~repeats, NOTHING))


def _without(scores_RNV: Tensor, history: Tensor, words: tuple[int, ...]) -> Tensor:
    """Without the last token of `words` where the others have just been said."""
    *start, last = words
    if len(start) > history.shape[2]:
        return scores_RNV
    wanted = torch.tensor(start, dtype=history.dtype, device=history.device)
    follows = (history[:, :, history.shape[2] - len(start) :] == wanted).all(dim=2, keepdim=True)
    return _banned(scores_RNV, torch.full_like(history[:, :, :1], last).masked_fill(~follows, NOTHING))


def _banned(scores_RNV: Tensor, tokens: Tensor) -> Tensor:
    """-inf for `tokens` [R, N, any], where they are not NOTHING."""
    vocabulary = scores_RNV.shape[2]
    padded = functional.pad(scores_RNV, (0, 1))
    return padded.scatter(2, tokens.masked_fill(tokens == NOTHING, vocabulary), -torch.inf)[:, :, :vocabulary]
