"""The outputs of rows: decoded on all ranks, in row order on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings, decode
from harness.decoding.decode import Hypothesis
from harness.decoding.lexical import Phrase
from harness.engine.processes import Processes
from harness.evaluation.partial import Partial
from harness.evaluation.result import EvaluationInterrupted
from harness.io.faults import fault_point
from harness.scoring.minimum_risk import rank_by_risk
from harness.tasks.task import DecodingTask, Output

PARTING = " ||| "  # between the phrases that an output must have


def outputs_of(
    found: Sequence[Hypothesis], task: DecodingTask, settings: BeamSettings, language: str | None
) -> list[Output]:
    """What is kept of the outputs of a row in the target `language`, best first; an empty one where the model's numbers
    are not finite."""
    outputs = [Output(task.to_text(one.token_ids), one.score, one.is_at_limit) for one in found]
    if settings.minimum_risk and outputs:
        is_at_limit = {one.text: one.is_at_limit for one in outputs}
        ranked = rank_by_risk([one.text for one in outputs], settings.minimum_risk.utility, language)
        outputs = [Output(text, risk, is_at_limit[text]) for text, risk in ranked[: settings.num_hypotheses]]
    return outputs or [Output("", -math.inf)]


def phrases_of(constraints: Sequence[str | None], task: DecodingTask) -> dict[int, list[Phrase]]:
    """The phrases that outputs must have, by place; rows without any are left out."""
    texts = [[part.strip() for part in (text or "").split(PARTING.strip()) if part.strip()] for text in constraints]
    phrases: dict[int, list[Phrase]] = {
        place: [ways for part in parts if (ways := task.ways_to_write(part))] for place, parts in enumerate(texts)
    }
    return {place: filled for place, filled in phrases.items() if filled}


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
    partial: Partial | None = None,
) -> list[list[Output]]:
    """The `settings.num_hypotheses` best outputs of each of the first `num_rows` rows, best first, on every rank.

    Rows are dealt to the ranks by length; those in `partial` are not decoded again. Raises EvaluationInterrupted on all
    ranks when one of them wants to stop.
    """
    sizes = rows.source_sizes[:num_rows].tolist()
    outputs = partial.read() if partial is not None else {}
    left = sorted(set(range(len(sizes))) - outputs.keys(), key=lambda row: (-sizes[row], row))
    languages = rows.texts("target_language")
    found: dict[int, list[Hypothesis]] = {}

    def texts() -> dict[int, list[Output]]:
        return {row: outputs_of(best, task, settings, languages[row]) for row, best in found.items()}

    def stops() -> bool:
        fault_point("decode")
        if partial is not None and partial.is_due:
            partial.write(texts())
        return stop_wanted()

    is_done = decode(
        model, sizes, lambda ids: task.collate_sources(rows.take(ids), processes.device),
        settings=settings, max_tokens=max_tokens, rows=left[processes.rank :: processes.world_size],
        synced=synced, agree=processes.sum, stop_wanted=stops, found=found,
        phrases=phrases_of(rows.texts("constraints")[:num_rows], task),
    )  # fmt: skip
    if is_done is None:
        if partial is not None:
            partial.write(texts())
        raise EvaluationInterrupted
    decoded = [item for part in processes.gather(list(texts().items())) for item in part]
    assert sorted(row for row, _ in decoded) == sorted(left), "every row is decoded exactly once"
    outputs |= dict(decoded)
    return [[Output(*one) for one in outputs[row]] for row in range(len(sizes))]
