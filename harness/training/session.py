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
from harness.data.loader import TrainingSteps, pack_length
from harness.engine.build import build_engine, close_engine
from harness.engine.processes import Processes
from harness.engine.rank_allocation import RankAllocator
from harness.errors import DataError
from harness.io import heartbeat
from harness.models.assemble import assemble
from harness.models.freeze import phase_boundaries
from harness.models.isolation import check_isolation
from harness.models.parameter_table import parameter_table
from harness.plan.plan import Plan
from harness.tasks.causal_lm import CausalTask
from harness.tasks.task import Task
from harness.training.prepare import RowSets, build_task, open_sets, with_prepared_labels
from harness.training.records import RunRecords
from harness.training.stop import StopRequest

CHECKPOINTS = "checkpoints"


@dataclass
class Progress:
    """What must survive a restart besides tensors. Randomness needs nothing: it follows from seed and step."""

    step: int = 0
    evaluated_step: int = -1
    best: dict[str, float] = field(default_factory=dict)  # step -> watched score of the kept best checkpoints
    best_step: int | None = None  # the last one whose score was better (early stopping: significantly) than before
    best_value: float | None = None
    evaluations_without_gain: int = 0
    data_digest: str = ""
    base_digest: str = ""  # of the weights that are in no checkpoint
    wall_time_s: float = 0.0
    restarts: int = 0


@dataclass
class Session:
    """The parts of a run on one rank."""

    plan: Plan
    config: RunConfig
    run_dir: Path
    processes: Processes
    task: Task
    engine: Any
    rows: RowSets
    steps: TrainingSteps
    total_steps: int
    records: RunRecords
    store: CheckpointStore
    stop: StopRequest
    progress: Progress
    saved_step: int  # of the newest checkpoint that holds this session's tensors; -1: none
    rank_allocator: RankAllocator | None = None  # of AdaLoRA
    started: float = field(default_factory=time.monotonic)

    @property
    def phase_boundaries(self) -> list[int]:
        """Steps after which more parameters are trained than before."""
        return [step for step in phase_boundaries(self.config.freeze) if step < self.total_steps]


def open_session(
    plan: Plan,
    run_dir: Path,
    prepared: dict[str, Any],
    processes: Processes,
    stop: StopRequest,
    timings: dict[str, float],
) -> Session:
    """Build the run from its plan and what `prepare` has left; go on from its newest checkpoint if there is one.

    `timings` are the seconds that the parts of the start-up have taken so far; the rest is added here.
    """
    config = with_prepared_labels(plan.config, run_dir)
    rows = open_sets(prepared["sets"])
    task = build_task(config)
    steps = TrainingSteps(
        rows.train, data=config.data, batch=config.batch, seed=config.seed, world_size=processes.world_size
    )
    total_steps = config.schedule.steps or max(1, round((config.schedule.epochs or 0) * steps.steps_per_epoch))
    store = CheckpointStore(run_dir / CHECKPOINTS)
    if processes.is_first:
        store.remove_leftovers()
    with timed(timings, "resume_s"):
        checkpoint, broken = checkpoint_state.newest(store, processes)
    progress = resumed_progress(checkpoint, rows.train.digest, prepared["base_digest"])
    engine = open_engine(config, plan, processes, checkpoint, total_steps, timings)
    if isinstance(task, CausalTask) and pack_length(config.data) is not None:
        check_isolation(engine.module, in_one_row=task.in_one_row)
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
    if config.adapter is not None or config.freeze:
        records.note(parameter_table(engine.module))
    for reason in broken:
        records.note(f"a checkpoint was passed over: {reason}")
    return Session(
        plan, config, run_dir, processes, task, engine, rows, steps, total_steps, records, store, stop, progress,
        saved_step=progress.step if checkpoint else -1,
        rank_allocator=RankAllocator(engine) if config.adapter and config.adapter.method == "adalora" else None,
    )  # fmt: skip


def open_engine(
    config: RunConfig,
    plan: Plan,
    processes: Processes,
    checkpoint: Checkpoint | None,
    total_steps: int,
    timings: dict[str, float],
) -> Any:
    """The engine for the step after `checkpoint` (None: the first), with its weights and moments."""
    step = checkpoint.step if checkpoint is not None else 0
    heartbeat.beat("load")
    with timed(timings, "model_s"):
        # What is quantised while it is read goes straight to the device; DeepSpeed moves all else there.
        device = str(processes.device) if config.model.quantization is not None else "cpu"
        model, freezing, new_heads = assemble(config, step=step, total_steps=total_steps, device=device)
    heartbeat.beat("load")
    with timed(timings, "engine_s"):
        engine = build_engine(
            model, config.optimizer, plan.deepspeed, processes, new_heads=new_heads, starts=freezing.starts
        )
    if checkpoint is not None:
        with timed(timings, "resume_s"):
            thawed = set(freezing.trainable_at(step + 1)) - set(freezing.trainable_at(step))
            checkpoint_state.load(checkpoint, engine, thawed=thawed)
    return engine


def change_phase(session: Session) -> None:
    """Go on with more trainable parameters than the steps so far had: save, and build the engine anew; a collective."""
    started = time.monotonic()
    save(session)
    reopen_engine(session, session.store.open(session.progress.step))
    seconds = time.monotonic() - started
    session.records.note(f"step {session.progress.step:,}: more parameters are trained from here on ({seconds:.1f} s)")


def reopen_engine(session: Session, checkpoint: Checkpoint) -> None:
    """Another engine for the step after `checkpoint`; the old one is freed first."""
    close_engine(session.engine)
    session.engine = None
    session.engine = open_engine(session.config, session.plan, session.processes, checkpoint, session.total_steps, {})


def resumed_progress(checkpoint: Checkpoint | None, data_digest: str, base_digest: str) -> Progress:
    """What a checkpoint knows of the run. Raises DataError when rows or base are not those it was made with."""
    if checkpoint is None:
        return Progress(data_digest=data_digest, base_digest=base_digest)
    progress = Progress(**{name: checkpoint.state[name] for name in Progress.__dataclass_fields__})
    if progress.data_digest != data_digest:
        raise DataError(
            "the training rows have changed since this checkpoint was written",
            where=str(checkpoint.directory),
            hint="bring the old data back, or give the run a new name to start again",
        )
    check_base(checkpoint, base_digest)
    progress.restarts += 1
    return progress


def check_base(checkpoint: Checkpoint, base_digest: str) -> None:
    """Raises DataError when the frozen weights, which the checkpoint does not hold, are not those it was made with."""
    if checkpoint.state["base_digest"] != base_digest:
        raise DataError(
            "the weights of the base have changed since this checkpoint was written, which holds only what was trained",
            where=str(checkpoint.directory),
            hint="bring the old files back to model.path, or give the run a new name to start again",
        )


def save(session: Session) -> None:
    """Commit a checkpoint of the current step and delete those that retention no longer wants; a collective.

    If the step is saved already, only what has been learnt about it since is added.
    """
    progress, options = session.progress, session.config.checkpoint
    heartbeat.beat("save")
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
