"""Texts that end an answer, as in transformers' StopStringCriteria and vLLM's `stop`.

Shapes: R sentences, N running outputs of each, L output tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "\ufffd"  # what a part of a character reads like


@dataclass(frozen=True)
class StopStrings:
    """An answer ends with the token that completes one of `strings` in its text, and reads to where that begins.

    The prompt does not count: a stop string must begin in the answer.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...]

    def cut(self, text: str) -> str:
        """What stands before the first stop string."""
        return text[: min((place for stop in self.strings if (place := text.find(stop)) >= 0), default=None)]

    def reached(self, tokens_RNL: Tensor, length_R: Tensor) -> Tensor:
        """Which outputs [R, N], of `length_R` tokens each, have just come to a stop string; looked at on the host."""
        num_outputs, room = tokens_RNL.shape[1:]
        size = min(self._num_tokens, room)
        place_RT = (length_R - size).clamp(0, room - size).unsqueeze(1) + torch.arange(size, device=length_R.device)
        tails = tokens_RNL.gather(2, place_RT.unsqueeze(1).expand(-1, num_outputs, -1)).tolist()
        found = [
            [self.has_stopped(tail[:length]) for tail in outputs]
            for outputs, length in zip(tails, length_R.tolist(), strict=True)
        ]
        return torch.tensor(found, device=tokens_RNL.device)

    def has_stopped(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token of an output completes a stop string."""
        if not self._may_complete(token_ids[-1]):
            return False
        text = self.tokenizer.decode(token_ids[-self._num_tokens :])
        return any(stop in text for stop in self.strings)

    def _may_complete(self, token: int) -> bool:
        """Whether some stop string ends in the token's text, which may lack a space in front when it stands alone."""
        if token not in self._known:
            alone = self.tokenizer.decode([token])
            self._known[token] = UNKNOWN in alone or any(
                stop in text or any(text.startswith(stop[start:]) for start in range(len(stop)))
                for stop in self.strings
                for text in (alone, f" {alone}")
            )
        return self._known[token]

    @cached_property
    def _known(self) -> dict[int, bool]:
        return {}

    @cached_property
    def _num_tokens(self) -> int:
        """No stop string has more tokens than bytes; the space before the first token may be lost."""
        return 1 + max(len(stop.encode()) for stop in self.strings)
