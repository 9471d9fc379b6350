"""A decode that is interrupted goes on with the rows that are left, on any number of ranks."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import MBartForConditionalGeneration

from harness.config.schema import RunConfig
from harness.data.cache import prepare_rows
from harness.data.encoded import EncodedRows
from harness.data.sources import as_source
from harness.decoding.beam import BeamSettings
from harness.evaluation import partial as partial_module
from harness.evaluation.evaluate import measure_loss
from harness.evaluation.outputs import decode_rows
from harness.evaluation.partial import Partial
from harness.evaluation.result import EvaluationInterrupted
from harness.tasks.task import DecodingTask, Output
from harness.training.prepare import build_task, encoding
from tests.lockstep import Threads, on_ranks
from tests.pairs import PAIRS
from tests.runs import tiny_run, write_pairs
from tests.tiny import talkative

SETTINGS = BeamSettings(3, 1.0, 24, num_hypotheses=2)
NUM_ROWS = 24
Outputs = list[list[Output]]


class WatchedRows(EncodedRows):
    """Rows that remember which of them were asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.taken: set[int] = set()

    def take(self, row_ids: Any) -> Any:
        self.taken |= set(row_ids)
        return super().take(row_ids)


@dataclass
class Decoding:
    """A model and rows to start with again and again."""

    model: Any
    rows: WatchedRows
    task: DecodingTask
    partial: Path
    done: dict[int, Any] = field(default_factory=dict)

    def start(self, num_ranks: int, *, stop_at: int | None = None, key: str = "key", synced: bool = False) -> Any:
        """The outputs that all ranks have; None if the last one wanted to stop when it was asked for the n-th time."""

        def on_rank(processes: Threads) -> Outputs | None:
            asked = itertools.count()
            is_last = processes.rank == num_ranks - 1
            try:
                return decode_rows(
                    copy.deepcopy(self.model), self.rows, self.task, processes,
                    settings=SETTINGS, max_tokens=3 * 3 * 20, num_rows=NUM_ROWS, synced=synced,
                    stop_wanted=lambda: is_last and next(asked) == stop_at,
                    partial=Partial(self.partial, key, processes),
                )  # fmt: skip
            except EvaluationInterrupted:
                return None

        self.rows.taken.clear()
        first, *others = on_ranks(num_ranks, on_rank)
        assert all(other == first for other in others)
        self.done = on_ranks(1, lambda processes: Partial(self.partial, key, processes).read())[0]
        return first


@pytest.fixture(scope="module")
def prepared(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, DecodingTask]:
    directory = tmp_path_factory.mktemp("interrupted")
    run = tiny_run(directory, talkative(tiny_models["mbart"], directory / "model"), name="run")
    config = RunConfig.model_validate(run)
    task = build_task(config)
    assert isinstance(task, DecodingTask)
    rows = prepare_rows(
        "validation", [as_source(str(write_pairs(directory / "rows.tsv", PAIRS)))], config.data,
        **encoding(config, task, is_training=False), cache_root=directory / "rows",
    ).rows  # fmt: skip
    return MBartForConditionalGeneration.from_pretrained(directory / "model").eval(), rows.directory, task


@pytest.fixture
def decoding(prepared: tuple[Any, Path, DecodingTask], tmp_path: Path) -> Decoding:
    model, rows, task = prepared
    return Decoding(model, WatchedRows(rows), task, tmp_path / "evaluations" / ".step-7.partial")


@pytest.mark.parametrize(("before", "after", "synced"), [(1, 2, False), (2, 1, False), (2, 3, True)])
def test_the_rest_is_decoded_and_nothing_twice(decoding: Decoding, before: int, after: int, synced: bool) -> None:
    whole = decoding.start(1)
    assert not decoding.partial.exists()
    assert decoding.start(before, stop_at=40 if synced else 3, synced=synced) is None
    first = set(decoding.done)
    assert 1 < len(first) < NUM_ROWS - 4
    assert decoding.start(after, stop_at=25 if synced else 2, synced=synced) is None
    second = set(decoding.done)
    assert first < second
    assert decoding.rows.taken.isdisjoint(first - {0})  # row 0 is looked at for its padding
    found = decoding.start(before, synced=synced)
    assert decoding.rows.taken.isdisjoint(second - {0})
    assert [[one.text for one in best] for best in found] == [[one.text for one in best] for best in whole]
    scores = [[one.score for best in outputs for one in best] for outputs in (found, whole)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert set(decoding.done) == second  # until what they are for is written


def test_a_loss_is_not_measured_to_its_end_either(decoding: Decoding) -> None:
    def on_rank(processes: Threads) -> int:
        """How often this rank was asked whether it wants to stop; the last one does at its second batch."""
        asked = 0

        def stop_wanted() -> bool:
            nonlocal asked
            asked += 1
            return processes.rank == 2 and asked == 2

        with pytest.raises(EvaluationInterrupted):
            measure_loss(
                copy.deepcopy(decoding.model), decoding.rows, decoding.task, processes,
                max_tokens=40, stop_wanted=stop_wanted,
            )  # fmt: skip
        return asked

    assert on_ranks(3, on_rank) == [2, 2, 2]


def test_rows_are_written_meanwhile_too(decoding: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "WRITE_EVERY_S", 0.0)
    found = decoding.start(2)
    written = sorted(path.name for path in decoding.partial.iterdir())
    assert written == ["after-0-rank-0.json", "after-0-rank-1.json"]
    assert decoding.done
    assert all([Output(*one) for one in outputs] == found[row] for row, outputs in decoding.done.items())


def test_rows_of_another_evaluation_do_not_count(decoding: Decoding) -> None:
    whole = decoding.start(1)
    assert decoding.start(2, stop_at=3, key="other weights") is None
    assert decoding.start(1) == whole
    assert decoding.rows.taken == set(range(NUM_ROWS))


def test_the_time_of_all_starts_counts(tmp_path: Path) -> None:
    def start(num_rows: int, num_ranks: int, *seconds: float) -> float:
        """Decodes rows up to `num_rows` in so many seconds on each rank; the time that was taken before."""

        def on_rank(processes: Threads) -> float:
            partial = Partial(tmp_path / "partial", "key", processes)
            partial.read()
            partial.started -= seconds[processes.rank]
            partial.write({row: [] for row in range(partial.num_before, num_rows)})
            return partial.seconds_before

        before, *others = on_ranks(num_ranks, on_rank)
        assert all(other == before for other in others)
        return float(before)

    assert start(3, 2, 100.0, 300.0) == 0.0
    assert start(5, 1, 1000.0) == pytest.approx(300.0, abs=5.0)
    assert start(6, 2, 0.0, 0.0) == pytest.approx(1300.0, abs=5.0)


def test_rows_of_other_steps_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    names = [".step-3.partial", ".step-7.partial", ".step-3-other.partial", "step-3"]
    for name in names:
        (tmp_path / name).mkdir()
    partial = Partial(tmp_path / ".step-7.partial", "key", Threads(0, 0, 1, torch.device("cpu"), dist.HashStore()))
    partial.remove_others(".step-?.partial")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    partial.remove()
    assert not partial.directory.exists()


def test_a_full_disk_costs_only_the_time(decoding: Decoding) -> None:
    decoding.partial.parent.mkdir(parents=True)
    decoding.partial.touch()  # no directory can be made here
    assert decoding.start(2, stop_at=3) is None
    assert not decoding.done
