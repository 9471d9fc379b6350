"""Whether the outputs of rows depend on how they share batches: decoded in several ways and compared.

Other batches mean other sums in the model's arithmetic, so two outputs that are equally good to its last digits may
change places. That is a numeric tie, and goes away in float64. A difference that stays is a dependence on neighbours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.schema import DataSource
from harness.data.encoded import EncodedRows
from harness.decoding.beam import BeamSettings, decode
from harness.decoding.decode import Hypothesis
from harness.engine.processes import find_device
from harness.errors import ConfigError, DataError, ExitCode
from harness.evaluation.settings import beam_settings
from harness.io.atomic import write_json
from harness.models.load import PACKED
from harness.models.precision import in_precision
from harness.tasks.task import DecodingTask
from harness.training.offline import languages_named_as_options, load_together, number_rows
from harness.training.prepare import build_task
from harness.training.subject import Member, Subject

OPTION = "--invariance"
NUM_SHOWN = 10  # changes that are printed
Found = dict[int, list[Hypothesis]]
Differences = dict[int, tuple[Hypothesis, Hypothesis]]


class Way(NamedTuple):
    """How rows are put into batches: `max_tokens` at a time, in `num_shares` that are decoded one after the other."""

    name: str
    max_tokens: float
    num_shares: int = 1


class Change(NamedTuple):
    """A row with an output that differs from that of the first way; `is_tie`: not in float64."""

    row: int
    way: Way
    first: Hypothesis
    other: Hypothesis
    is_tie: bool


@dataclass(frozen=True)
class Sentences:
    """The first `num_rows` rows of a set and how they are searched."""

    rows: EncodedRows
    task: DecodingTask
    settings: BeamSettings
    num_rows: int | None = None

    @property
    def sizes(self) -> list[int]:
        sizes: list[int] = self.rows.source_sizes[: self.num_rows].tolist()
        return sizes

    def decoded(self, model: Any, way: Way, numbers: Sequence[int] | None = None) -> Found:
        """The outputs of all rows or those of these `numbers`. Raises DataError if a row has none."""
        sizes = self.sizes
        chosen = range(len(sizes)) if numbers is None else numbers
        device = next(model.parameters()).device
        found: Found = {}
        for share in range(way.num_shares):
            decode(
                model, sizes, lambda ids: self.task.collate_sources(self.rows.take(ids), device),
                settings=self.settings, max_tokens=way.max_tokens, rows=chosen[share :: way.num_shares], found=found,
            )  # fmt: skip
        if not all(found.values()):
            raise DataError("some rows have no output: the model's numbers are not finite", where=OPTION)
        return found


def ways(max_tokens: int) -> list[Way]:
    """What is compared; a row's neighbours are others in each, and none in the last."""
    return [
        Way(f"{max_tokens:,} tokens at a time", max_tokens),
        Way("half as many", max_tokens / 2),
        Way("twice as many", max_tokens * 2),
        Way("every other row, then the rest", max_tokens, 2),
        Way("one row at a time", 0),
    ]


def compare(model: Any, sentences: Sentences, max_tokens: int) -> tuple[list[dict[str, Any]], list[Change]]:
    """What was done in each way, and every change. If there is any, `model` is in float64 afterwards."""
    first, *others = ways(max_tokens)
    found, figures = {}, []
    for way in (first, *others):
        started = time.monotonic()
        found[way] = sentences.decoded(model, way)
        figures.append({"way": way.name, "seconds": round(time.monotonic() - started, 2)})
    changed = {way: differences(found[first], found[way]) for way in others}
    exact = _changed_in_float64(model, sentences, first, changed) if any(changed.values()) else {}
    changes = [
        Change(row, way, *outputs, row not in exact[way])
        for way, rows in changed.items()
        for row, outputs in rows.items()
    ]
    for way, figure in zip((first, *others), figures, strict=True):
        own = [change for change in changes if change.way == way]
        figure |= {"changed": len(own), "ties": sum(change.is_tie for change in own)}
    return figures, changes


def _changed_in_float64(
    model: Any, sentences: Sentences, first: Way, changed: dict[Way, Differences]
) -> dict[Way, set[int]]:
    """Which of the rows that `changed` do so in double precision too, beside the same neighbours."""
    model.double()
    expected = sentences.decoded(model, first)
    exact = {}
    for way, rows in changed.items():
        is_alone = way.max_tokens == 0
        found = sentences.decoded(model, way, sorted(rows) if is_alone else None) if rows else {}
        exact[way] = rows.keys() & differences(expected, found).keys()
    return exact


def differences(first: Found, other: Found) -> Differences:
    """Of each row of `other` that does not have the same outputs in `first`, the first two that are not the same."""
    found = {}
    for row, outputs in sorted(other.items()):
        pairs = zip_longest(first[row], outputs, fillvalue=Hypothesis([], 0.0))
        if pair := next((pair for pair in pairs if pair[0].token_ids != pair[1].token_ids), None):
            found[row] = pair
    return found


def check_invariance(
    subject: Subject, name: str, source: DataSource | str, directory: Path, *, num_rows: int | None
) -> ExitCode:
    """Decodes a set in all ways, prints what changed and writes it to invariance.json. Fails on a real dependence."""
    config = subject.config
    options = config.evaluation
    assert options is not None
    with tempfile.TemporaryDirectory(prefix="harness-invariance-") as scratch, languages_named_as_options():
        rows, task = number_rows(config, name, source, Path(scratch)), build_task(config)
        if not isinstance(task, DecodingTask):
            raise ConfigError(f"the task is {config.task}, which does not decode", where=OPTION)
        model = load_together(Member(config, subject.adapter), subject.others, find_device(0))
        if any(type(weight).__name__ in PACKED for weight in model.parameters()):
            raise ConfigError("compares in float64, which quantised weights cannot be", where=OPTION)
        model = in_precision(model, options.precision)
        sentences = Sentences(rows, task, beam_settings(config, task), num_rows)
        figures, changes = compare(
            model, sentences, options.max_tokens_per_device or config.batch.max_tokens_per_device
        )
        listed = [_described(change, sentences) for change in changes]
    write_json(directory / "invariance.json", {"rows": len(sentences.sizes), "ways": figures, "changes": listed})
    print(table(figures, listed))
    print(f"{len(sentences.sizes):,} rows; invariance.json is in {directory}")
    return ExitCode.DONE if all(change.is_tie for change in changes) else ExitCode.OTHER


def _described(change: Change, sentences: Sentences) -> dict[str, Any]:
    return {
        "row": change.row + 1,
        "way": change.way.name,
        "kind": "numeric tie" if change.is_tie else "depends on neighbours",
        "source": sentences.rows.texts("source")[change.row],
        "outputs": [sentences.task.to_text(one.token_ids) for one in (change.first, change.other)],
        "scores": [one.score for one in (change.first, change.other)],
    }


def table(figures: Sequence[dict[str, Any]], changes: Sequence[dict[str, Any]]) -> str:
    """Each way with the number of rows that changed, then both outputs of some, dependences first."""
    lines = [f"{'decoded':<32}{'seconds':>9}{'changed':>9}{'ties':>6}"]
    lines += [f"{one['way']:<32}{one['seconds']:>9.1f}{one['changed']:>9}{one['ties']:>6}" for one in figures]
    for change in sorted(changes, key=lambda change: str(change["kind"]))[:NUM_SHOWN]:
        lines.append(f"row {change['row']}, {change['way']}: {change['kind']}")
        scored = zip(change["scores"], change["outputs"], strict=True)
        lines += [f"  {score:.6f}  {text}" for score, text in scored]
    if len(changes) > NUM_SHOWN:
        lines.append(f"and {len(changes) - NUM_SHOWN} more")
    return "\n".join(lines)
