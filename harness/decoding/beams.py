"""The state of many beam searches between two steps.

Shapes: R sentences, N running outputs (beams) of each in G groups, P forced tokens, L output tokens, C tokens before
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
    places are taken. `shortest_R` tokens come before an end, `limit_R` is the longest output. `can_improve_R`: a
    running output might still enter the best. Each group is searched by itself; `is_open_RG` tells which ones are not
    done yet. `rows_R` are the callers' numbers of the rows; `before_RC` is what stood before the outputs, where it
    matters.
    """

    tokens_RNL: Tensor
    log_p_RN: Tensor
    best_RNL: Tensor
    best_length_RN: Tensor
    best_score_RN: Tensor
    is_full_RN: Tensor
    length_R: Tensor
    shortest_R: Tensor
    limit_R: Tensor
    can_improve_R: Tensor
    is_open_RG: Tensor
    rows_R: Tensor
    before_RC: Tensor

    @classmethod
    def begin(
        cls,
        prefix_RP: Tensor,
        limit_R: Tensor,
        num_outputs: int,
        room: int,
        *,
        rows_R: Tensor,
        before_RC: Tensor,
        shortest_R: Tensor | None = None,
        num_groups: int = 1,
    ) -> Beams:
        """One running output per group, `prefix_RP`, and others that lose against any."""
        num_sentences, length = prefix_RP.shape
        shape = (num_sentences, num_outputs)
        tokens_RNL = prefix_RP.new_zeros((*shape, room))
        tokens_RNL[:, :, :length] = prefix_RP.unsqueeze(1)
        log_p_RN = torch.full(shape, NEVER, device=prefix_RP.device)
        log_p_RN[:, :: num_outputs // num_groups] = 0.0
        is_open_RG = torch.ones((num_sentences, num_groups), dtype=torch.bool, device=prefix_RP.device)
        return cls(
            tokens_RNL=tokens_RNL,
            log_p_RN=log_p_RN,
            best_RNL=tokens_RNL.clone(),
            best_length_RN=torch.zeros_like(tokens_RNL[:, :, 0]),
            best_score_RN=torch.full_like(log_p_RN, NEVER),
            is_full_RN=torch.zeros(shape, dtype=torch.bool, device=prefix_RP.device),
            length_R=torch.full_like(limit_R, length),
            shortest_R=torch.zeros_like(limit_R) if shortest_R is None else shortest_R,
            limit_R=limit_R,
            can_improve_R=is_open_RG[:, 0].clone(),
            is_open_RG=is_open_RG,
            rows_R=rows_R,
            before_RC=before_RC,
        )

    @property
    def is_open(self) -> Tensor:
        """[R]: which searches are not done yet."""
        return self.is_open_RG.any(dim=1)

    @property
    def last_tokens(self) -> Tensor:
        """[R, N]"""
        num_outputs = self.tokens_RNL.shape[1]
        return self.tokens_RNL.gather(2, (self.length_R - 1)[:, None, None].expand(-1, num_outputs, 1)).squeeze(2)

    def take(self, places: Tensor) -> Beams:
        """Some of the searches."""
        return Beams(**{field.name: getattr(self, field.name)[places] for field in fields(Beams)})

    def put(self, places: Tensor, part: Beams) -> None:
        """Puts back what has become of them."""
        for name in (field.name for field in fields(Beams)):
            setattr(self, name, getattr(self, name).index_copy(0, places, getattr(part, name)))

    def group(self, number: int) -> Beams:
        """One of the G groups, as searches of their own."""
        num_groups = self.is_open_RG.shape[1]
        parts = {}
        for name in (field.name for field in fields(Beams)):
            value = getattr(self, name)
            parts[name] = value.chunk(num_groups, dim=1)[number] if _is_of_groups(name) else value
        return Beams(**parts)

    def join(self, groups: list[Beams]) -> None:
        """Puts back what has become of the groups."""
        for name in (field.name for field in fields(Beams)):
            if _is_of_groups(name):
                setattr(self, name, torch.cat([getattr(one, name) for one in groups], dim=1))
        self.length_R = torch.stack([one.length_R for one in groups]).amax(dim=0)

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


def _is_of_groups(name: str) -> bool:
    """Whether the second dimension of a field is one of outputs or groups."""
    return name.rpartition("_")[2][1:2] in ("N", "G")
