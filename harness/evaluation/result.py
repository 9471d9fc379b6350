"""What an evaluation of a set of rows gives, whatever the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.errors import Interrupted
from harness.reports.report import write_losses
from harness.scoring.significance import WrittenEvaluation


class EvaluationInterrupted(Interrupted):
    """A stop was agreed on meanwhile; rows that are decoded are kept for the next start (`partial.py`)."""

    def __init__(self) -> None:
        super().__init__(
            "stopped in the middle of the evaluation; rows that are decoded are kept",
            hint="run the same command again to go on with the others",
        )


@dataclass(frozen=True)
class Evaluation:
    """`losses` (loss, nll) per target of `num_rows` rows; the tasks that predict something add to it."""

    losses: dict[str, float]
    num_rows: int
    seconds: float

    @property
    def values(self) -> dict[str, float]:
        """Losses and scores by name."""
        return self.losses

    @property
    def limits(self) -> dict[str, float]:
        """The ends of the 95 % intervals of scores: bleu_low, bleu_high, ..."""
        return {}

    @property
    def signatures(self) -> dict[str, str]:
        """What must be told with a score to make it comparable, by name of the score."""
        return {}

    def samples(self) -> Iterator[tuple[str, str, str]]:
        """(source, reference, output) of the rows."""
        return iter(())

    def images(self) -> dict[str, NDArray[np.uint8]]:
        """Pictures [height, width, 3] by name."""
        return {}

    def write(self, directory: Path, baseline: WrittenEvaluation | None = None) -> None:
        """The files of docs/evaluation.md. Raises OSError, or HarnessError if `directory` holds something else.

        The page of decoded rows compares with `baseline`, by default with the last step before.
        """
        write_losses(directory, self.losses, self.num_rows, self.seconds)
