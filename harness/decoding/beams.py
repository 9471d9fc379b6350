"""The state of many beam searches between two steps.

Shapes: R sentences, N running outputs (beams) of each, P forced tokens, L output tokens, C tokens before
the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from harness.models.tree import ROOM

NEVER = -1.0e9  # log p of what cannot be chosen
NOTHING = -1  # stands where a row has no token


@dataclass
class Beams:
    """R searches between two steps.

    `tokens_RNL` are the running outputs, of which `length_R` tokens are there, with log p `log_p_RN`. `best_RNL` are
    the N best finished ones with `best_length_RN` tokens, </s> included, and `best_score_RN`; `is_full_RN` tells which
    places are taken. `limit_R` is the longest output. `can_improve_R`: a running output might still enter the best.
    `rows_R` are the callers' numbers of the rows; `before_RC` is what stood before the outputs, where it matters.
    """

    tokens_RNL: Tensor
    log_p_RN: Tensor
    best_RNL: Tensor
    best_length_RN: Tensor
    best_score_RN: Tensor
    is_full_RN: Tensor
    length_R: Tensor
    limit_R: Tensor
    can_improve_R: Tensor
    is_open_R: Tensor
    rows_R: Tensor
    before_RC: Tensor

    @classmethod
    def begin(
        cls, prefix_RP: Tensor, limit_R: Tensor, num_outputs: int, room: int, *, rows_R: Tensor, before_RC: Tensor
    ) -> Beams:
        """One running output per sentence, `prefix_RP`, and N - 1 that lose against any other."""
        num_sentences, length = prefix_RP.shape
        shape = (num_sentences, num_outputs)
        tokens_RNL = prefix_RP.new_zeros((*shape, room))
        tokens_RNL[:, :, :length] = prefix_RP.unsqueeze(1)
        log_p_RN = torch.zeros(shape, device=prefix_RP.device)
        log_p_RN[:, 1:] = NEVER
        is_open_R = torch.ones(num_sentences, dtype=torch.bool, device=prefix_RP.device)
        return cls(
            tokens_RNL=tokens_RNL,
            log_p_RN=log_p_RN,
            best_RNL=tokens_RNL.clone(),
            best_length_RN=torch.zeros_like(tokens_RNL[:, :, 0]),
            best_score_RN=torch.full_like(log_p_RN, NEVER),
            is_full_RN=torch.zeros(shape, dtype=torch.bool, device=prefix_RP.device),
            length_R=torch.full_like(limit_R, length),
            limit_R=limit_R,
            can_improve_R=is_open_R.clone(),
            is_open_R=is_open_R,
            rows_R=rows_R,
            before_RC=before_RC,
        )

    @property
    def last_tokens(self) -> Tensor:
        """[R, N]"""
        num_outputs = self.tokens_RNL.shape[1]
        return self.tokens_RNL.gather(2, (self.length_R - 1)[:, None, None].expand(-1, num_outputs, 1)).squeeze(2)

    @staticmethod
    def merge(parts: list[tuple[Beams, Tensor]]) -> Beams:
        """The named sentences of each, with room for ROOM more tokens."""
        joined: dict[str, Tensor] = {}
        room = ROOM + max(int(beams.length_R.max()) for beams, _ in parts)
        for name in (field.name for field in fields(Beams)):
            picked = [getattr(beams, name)[rows] for beams, rows in parts]
            if name.endswith("L"):
                picked = [functional.pad(one, (0, max(0, room - one.shape[2])))[:, :, :room] for one in picked]
            if name.endswith("C"):
                widest = max(one.shape[1] for one in picked)
                picked = [functional.pad(one, (widest - one.shape[1], 0), value=NOTHING) for one in picked]
            joined[name] = torch.cat(picked)
        return Beams(**joined)
