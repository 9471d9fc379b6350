"""Everything a run tells about itself while it trains: metrics.jsonl, TensorBoard and the terminal, written by rank 0.

A writer that fails (full disk, no permission) never stops training: what it loses is counted and reported.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import RunConfig
from harness.errors import HarnessError
from harness.scoring.scores import LABELS
from harness.training.console import Console
from harness.training.event_file import EventFile, sample_table
from harness.training.metrics_file import MetricsFile

_TRAIN_TAGS = {"loss", "nll", "learning_rate", "grad_norm", "update_to_weight_ratio"}


@dataclass
class Totals:
    """Over all attempts of the run, without the steps that were done again: target tokens and seconds in steps."""

    target_tokens: int = 0
    step_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.target_tokens / self.step_seconds if self.step_seconds else 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        self.target_tokens += record["target_tokens"]
        self.step_seconds += record["target_tokens"] / record["tokens_per_second"]


class RunRecords:
    """The records of one run. On ranks other than 0 every method does nothing."""

    def __init__(self, console: Console | None, metrics: MetricsFile, events: EventFile | None, log_every: int) -> None:
        self._console, self._metrics, self._events, self._log_every = console, metrics, events, log_every
        self._totals = Totals()
        self.lost: Counter[str] = Counter()

    @classmethod
    def open(
        cls, run_dir: Path, config: RunConfig, rank: int, *, resumed_step: int | None, total_steps: int | None = None
    ) -> RunRecords:
        """Go on with the records of a run directory, from the step after `resumed_step` (None: from the start).

        What an earlier attempt recorded after that step is taken back. `total_steps` (default: `schedule.steps`) is for
        the time left.
        """
        monitor = config.monitor
        metrics = MetricsFile(run_dir / "metrics.jsonl")
        if rank != 0:
            return cls(None, metrics, None, monitor.log_every_steps)
        console = Console(resumed_step or 0, total_steps or config.schedule.steps)
        first_step = 0 if resumed_step is None else resumed_step + 1
        events = EventFile(run_dir / "tensorboard", first_step) if monitor.tensorboard else None
        records = cls(console, metrics, events, monitor.log_every_steps)
        records.attempt("metrics.jsonl", lambda: records._rewind(resumed_step))
        if resumed_step is None:
            metric_tags = ["train/loss", *(f"validation/{name}" for name in _metrics_of(config))]
            records._tensorboard(lambda file: file.hyper_parameters(config.model_dump(mode="json"), metric_tags))
        return records

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """An optimizer step: `values` are the fields of its record, numbers becoming curves."""
        self._record("step", step, values)
        self._totals.add(values)
        self._curves(step, {_step_tag(name): value for name, value in values.items()})
        if self._console is not None:
            text = _step_text(values)
            self._console.progress(step, text)
            if step % self._log_every == 0 or step == self._console.total_steps:
                self._console.line(f"{self._console.position(step)}: {text}")

    def evaluation(
        self, step: int, set_name: str, values: Mapping[str, float], *, signatures: Mapping[str, str]
    ) -> None:
        """Scores of one set. `values`: sentences, decode_seconds, loss, nll and the scores by name."""
        self._record("evaluation", step, {"set": set_name, **values, "signature": dict(signatures)})
        self._curves(step, {f"{set_name}/{name}": value for name, value in values.items()})
        scores = ", ".join(
            f"{label} {values[name]:.{2 if name in signatures else 4}f}"
            for name, label in LABELS.items()
            if name in values
        )
        size = f"{values['sentences']:,} sentences in {values['decode_seconds']:.1f} s"
        self.note(f"step {step:,}, {set_name}: {scores} ({size})")

    def samples(self, step: int, set_name: str, rows: Sequence[tuple[str, str, str]]) -> None:
        """(source, reference, output) of some rows, as a table on TensorBoard's TEXT page."""
        self._tensorboard(lambda file: file.text(step, f"{set_name}/samples", sample_table(rows)))

    def images(self, step: int, set_name: str, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Pictures [height, width, 3] by name, on TensorBoard's IMAGES page."""
        for name, picture in pictures.items():
            self._tensorboard(partial(EventFile.image, step=step, tag=f"{set_name}/{name}", picture=picture))

    def checkpoint(self, step: int, *, path: str, bytes: int, seconds: float, blocked_seconds: float) -> None:
        """A committed checkpoint."""
        values = {"path": path, "bytes": bytes, "seconds": seconds, "blocked_seconds": blocked_seconds}
        self._record("checkpoint", step, values)
        self._curves(step, {f"checkpoint/{name}": value for name, value in values.items()})
        self.note(f"step {step:,}: checkpoint of {bytes / 2**20:,.1f} MiB saved in {seconds:.1f} s")

    def event(self, event: str, step: int, *, reason: str, **fields: Any) -> None:
        """`start`, `stop`, `restart` or `skip`, with its reason (and `world_size`)."""
        self._record(event, step, {"reason": reason, **fields})
        self.note(f"step {step:,}, {event}: {reason}")

    def note(self, text: str) -> None:
        """A line for the user, kept nowhere but in the log."""
        if self._console is not None:
            self._console.line(text)

    def totals(self) -> Totals:
        return self._totals

    def close(self) -> None:
        """Take the bar away and tell what was lost."""
        for name, count in self.lost.items():
            self.note(f"{name}: {count:,} records could not be written")
        if self._console is not None:
            self._console.close()
        if self._events is not None:
            self._events.close()

    def _rewind(self, resumed_step: int | None) -> None:
        for record in self._metrics.rewind(resumed_step):
            if record["event"] == "step":
                self._totals.add(record)

    def _record(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        record = {"event": event, "step": step, "time_s": round(time.time(), 3), **values}
        if self._console is not None:
            self.attempt("metrics.jsonl", lambda: self._metrics.append(record))

    def _curves(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {tag: float(value) for tag, value in values.items() if isinstance(value, int | float)}
        self._tensorboard(lambda file: file.scalars(step, numbers))

    def _tensorboard(self, write: Callable[[EventFile], None]) -> None:
        events = self._events
        if events is not None:
            self.attempt("tensorboard", lambda: write(events))

    def attempt(self, name: str, write: Callable[[], None]) -> None:
        """Run `write`; when it cannot write, that is counted under `name` and told, and training goes on."""
        try:
            write()
        except (OSError, HarnessError) as error:
            self.lost[name] += 1
            if self.lost[name] == 1:
                why = error.strerror if isinstance(error, OSError) else error
                self.note(f"{name} cannot be written ({why}); training goes on without it while that lasts")


def _metrics_of(config: RunConfig) -> list[str]:
    return list(config.evaluation.metrics) if config.evaluation else []


def _step_tag(name: str) -> str:
    return f"train/{name}" if name in _TRAIN_TAGS else f"throughput/{name}"


def _step_text(values: Mapping[str, Any]) -> str:
    return (
        f"loss {values['loss']:.4f}, nll {values['nll']:.4f}, lr {values['learning_rate']:.2e}, "
        f"norm {values['grad_norm']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
    )
