"""Everything a run needs, brought together in order: rows, process group, model, engine, records, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.checkpoint import state as checkpoint_state
from harness.checkpoint.store import Checkpoint, CheckpointStore
from harness.config.schema import RunConfig
from harness.data.loader import TrainingSteps
from harness.engine.build import build_engine
from harness.engine.processes import Processes
from harness.errors import DataError
from harness.models.load import load_model
from harness.plan.plan import Plan
from harness.tasks.translation import TranslationTask
from harness.training.prepare import RowSets, build_task, open_sets
from harness.training.records import RunRecords
from harness.training.stop import StopRequest

CHECKPOINTS = "checkpoints"


@dataclass
class Progress:
    """What must survive a restart besides tensors. Randomness needs nothing: it follows from seed and step."""

    step: int = 0
    evaluated_step: int = -1
    best: dict[str, float] = field(default_factory=dict)  # step -> watched score of the kept best checkpoints
    best_value: float | None = None
    evaluations_without_gain: int = 0
    data_digest: str = ""
    wall_time_s: float = 0.0
    restarts: int = 0


@dataclass
class Session:
    """The parts of a run on one rank."""

    plan: Plan
    config: RunConfig
    run_dir: Path
    processes: Processes
    task: TranslationTask
    engine: Any
    rows: RowSets
    steps: TrainingSteps
    total_steps: int
    records: RunRecords
    store: CheckpointStore
    stop: StopRequest
    progress: Progress
    saved_step: int  # of the newest checkpoint that holds this session's tensors; -1: none
    started: float = field(default_factory=time.monotonic)

    @property
    def is_parameter_sharded(self) -> bool:
        """ZeRO-3: every forward pass is a collective."""
        return int(self.engine.zero_optimization_stage()) == 3 and self.processes.world_size > 1


def open_session(
    plan: Plan,
    run_dir: Path,
    directories: dict[str, str],
    processes: Processes,
    stop: StopRequest,
    timings: dict[str, float],
) -> Session:
    """Build the run from its plan, and go on from its newest checkpoint if there is one.

    `timings` are the seconds that the parts of the start-up have taken so far; the rest is added here.
    """
    config = plan.config
    rows = open_sets(directories)
    task = build_task(config)
    with timed(timings, "model_s"):
        model = load_model(config.model, config.seed)
    with timed(timings, "engine_s"):
        engine = build_engine(model, config.optimizer, plan.deepspeed, processes)
    steps = TrainingSteps(
        rows.train, data=config.data, batch=config.batch, seed=config.seed, world_size=processes.world_size
    )
    store = CheckpointStore(run_dir / CHECKPOINTS)
    progress = Progress(data_digest=rows.train.digest)
    if processes.is_first:
        store.remove_leftovers()
    checkpoint, broken = checkpoint_state.newest(store, processes)
    if checkpoint is not None:
        with timed(timings, "resume_s"):
            progress = resume(engine, checkpoint, rows.train.digest)
    total_steps = config.schedule.steps or max(1, round((config.schedule.epochs or 0) * steps.steps_per_epoch))
    records = RunRecords.open(
        run_dir,
        config,
        processes.rank,
        resumed_step=progress.step if checkpoint else None,
        total_steps=total_steps,
    )
    records.event(
        "restart" if checkpoint else "start",
        progress.step,
        reason=f"from {checkpoint.directory.name}" if checkpoint else "from the beginning",
        world_size=processes.world_size,
        **timings,
    )
    for reason in broken:
        records.note(f"a checkpoint was passed over: {reason}")
    return Session(
        plan, config, run_dir, processes, task, engine, rows, steps, total_steps, records, store, stop, progress,
        saved_step=progress.step if checkpoint else -1,
    )  # fmt: skip


def resume(engine: Any, checkpoint: Checkpoint, data_digest: str) -> Progress:
    """Load a checkpoint into the engine. Raises DataError when the training rows are not those it was made with."""
    progress = Progress(**{name: checkpoint.state[name] for name in Progress.__dataclass_fields__})
    if progress.data_digest != data_digest:
        raise DataError(
            "the training rows have changed since this checkpoint was written",
            where=str(checkpoint.directory),
            hint="bring the old data back, or give the run a new name to start again",
        )
    checkpoint_state.load(checkpoint, engine)
    progress.restarts += 1
    return progress


def save(session: Session) -> None:
    """Commit a checkpoint of the current step and delete those that retention no longer wants; a collective.

    If the step is saved already, only what has been learnt about it since is added.
    """
    progress, options = session.progress, session.config.checkpoint
    started = time.monotonic()
    state = asdict(progress) | {"wall_time_s": progress.wall_time_s + started - session.started}
    if session.saved_step == progress.step:
        checkpoint_state.amend(session.store, session.processes, step=progress.step, state=state)
    else:
        checkpoint = checkpoint_state.save(
            session.store, session.engine, session.processes, step=progress.step, state=state
        )
        if checkpoint is not None:
            seconds = time.monotonic() - started
            session.records.checkpoint(
                progress.step, path=str(checkpoint.directory), bytes=checkpoint.num_bytes,
                seconds=seconds, blocked_seconds=seconds,
            )  # fmt: skip
        session.saved_step = progress.step
    if session.processes.is_first:
        session.store.retain(progress.step, num_last=options.keep_last, best=map(int, progress.best))
    session.processes.barrier()


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to `timings[name]`."""
    started = time.monotonic()
    yield
    timings[name] = timings.get(name, 0.0) + time.monotonic() - started
