"""The outputs of rows: decoded on all ranks, in row order on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings, decode
from harness.engine.processes import Processes
from harness.evaluation.result import EvaluationInterrupted
from harness.tasks.task import DecodingTask


class Output(NamedTuple):
    """One output of a row, with its score (`Preset.formula`)."""

    text: str
    score: float


def decode_rows(
    model: Any,
    rows: EncodedRows,
    task: DecodingTask,
    processes: Processes,
    *,
    settings: BeamSettings,
    max_tokens: int,
    num_rows: int | None = None,
    synced: bool = False,
    stop_wanted: Callable[[], bool] = lambda: False,
    partial: Path | None = None,
) -> list[list[Output]]:
    """The `settings.num_hypotheses` best outputs of each of the first `num_rows` rows, best first, on every rank.

    Rows are dealt to the ranks by length. Raises EvaluationInterrupted on all ranks when one of them wants to stop.
    """
    sizes = rows.source_sizes[:num_rows].tolist()
    longest_first = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    found = decode(
        model, sizes, lambda ids: task.collate_sources(rows.take(ids), processes.device),
        settings=settings, max_tokens=max_tokens, rows=longest_first[processes.rank :: processes.world_size],
        synced=synced, agree=processes.sum, stop_wanted=stop_wanted,
    )  # fmt: skip
    if found is None:
        raise EvaluationInterrupted
    mine = [(row, [(task.to_text(one.token_ids), one.score) for one in best]) for row, best in found.items()]
    everyone = sorted((row, best) for part in processes.gather(mine) for row, best in part)
    assert [row for row, _ in everyone] == list(range(len(sizes))), "every row is decoded exactly once"
    return [[Output(*one) for one in best] for _, best in everyone]
