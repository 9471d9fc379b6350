"""How toolkits rank outputs and end a search, read from their code: one place for formulas, stop rules and defaults.

Sources: transformers 5.23 `GenerationMixin._beam_search`; fairseq `sequence_generator.py`; tensor2tensor
`beam_search.py`, after Wu et al. 2016 (GNMT), equation 14 without coverage; marian-dev `history.h`, `beam_search.cpp`;
OpenNMT-py `beam_search.py`; CTranslate2 `decoding.cc`, and outputs and scores of CTranslate2 4.8.5, which counts </s>.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Stop = Literal["unlikely", "impossible", "full", "first", "filled", "bound", "narrow", "top"]


@dataclass(frozen=True)
class Preset:
    """One convention. A score is log p / divisor.

    `stop` ends a search when (N beams)
    - unlikely: the best running output, were it to end now, would not be among the N best finished ones;
    - impossible: it would not at any length; full: as unlikely, or N are finished;
    - first: N are finished, of those that end in one step the likeliest first; filled: N or more are finished, of which
      the best count, or without length penalty as in top;
    - bound: the best running output cannot overtake the best finished one at the longest length, or if more than one
      is wanted the worst of N;
    - narrow: each finished output has taken the place of a beam for good, and none is left;
    - top: the likeliest candidate of a step has ended once, and as many as are wanted are finished.
    `has_no_spare`: N candidates are looked at in a step instead of 2 N. `forces_end`: an output at the longest length
    ends in </s> with its log p, if it may; else it is cut.
    """

    stop: Stop
    is_gnmt: bool = False
    counts_start: bool = False
    has_no_spare: bool = False
    forces_end: bool = False

    def divisor(self, length: Tensor, length_penalty: float) -> Tensor:
        """What log p is divided by. `length` counts all output tokens, an end too."""
        counted = length.float() + int(self.counts_start)
        base = (5.0 + counted) / 6.0 if self.is_gnmt else counted
        divisor: Tensor = base**length_penalty
        return divisor

    @property
    def formula(self) -> str:
        """The score in words."""
        divisor = "((5 + T) / 6)^length_penalty" if self.is_gnmt else "T^length_penalty"
        start = ", and the decoder start" if self.counts_start else ""
        return f"sum log p / {divisor}; T counts every output token: forced language tag and </s> included{start}"


HF = Preset("unlikely")
PRESETS = {
    "hf": HF,
    "fairseq": Preset("first", forces_end=True),
    "gnmt": Preset("bound", is_gnmt=True),
    "marian": Preset("narrow", has_no_spare=True),
    "opennmt": Preset("top", counts_start=True, has_no_spare=True),
    "ctranslate2": Preset("filled"),
}
