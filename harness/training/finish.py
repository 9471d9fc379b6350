"""The end of a run: the best weights, the test scores, the exported model, the summary."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import state as checkpoint_state
from harness.checkpoint.export import export_model, overwrite_parameters
from harness.checkpoint.store import Checkpoint, CheckpointStore
from harness.config.schema import RunConfig
from harness.data.encoded import EncodedRows
from harness.engine.measure import peak_memory_bytes
from harness.errors import DataError
from harness.io.atomic import write_json
from harness.models.load import load_model, reload_model
from harness.tasks.translation import TranslationTask
from harness.training.session import CHECKPOINTS, Session, save
from harness.training.validate import best_step, evaluate_set, evaluate_validation

NUM_FIXED_ROWS = 4  # rows on which an export is compared


def finish(session: Session) -> None:
    """Save, go back to the best checkpoint, score the test set, export, and write summary.json; a collective."""
    progress = session.progress
    evaluate_validation(session)
    if progress.step not in session.store.steps():
        save(session)
    chosen = best_step(progress.best, progress.best_value) or progress.step
    last_step = progress.step
    if chosen != progress.step:
        checkpoint_state.load(session.store.open(chosen), session.engine)
        progress.step = chosen
    scores = {}
    if session.rows.test is not None and session.config.evaluation is not None:
        scores = evaluate_set(session, "test", session.rows.test).values
    if session.processes.is_first:
        checkpoint = session.store.open(chosen)
        export_checkpoint(checkpoint, session.config, session.task, session.rows.train, session.run_dir / "export")
        write_summary(session, last_step, chosen, scores)
    session.processes.barrier()


def export_checkpoint(
    checkpoint: Checkpoint, config: RunConfig, task: TranslationTask, rows: EncodedRows, directory: Path
) -> None:
    """The model of a checkpoint as a Hugging Face directory in the run's dtype."""
    model = load_model(config.model.model_copy(update={"gradient_checkpointing": False}), config.seed)
    overwrite_parameters(model, checkpoint)
    batch = task.collate(rows.take(range(min(NUM_FIXED_ROWS, len(rows)))), torch.device("cpu"))
    dtype = getattr(torch, config.model.dtype)
    export_model(model, task.tokenizer, directory, dtype=dtype, reload=reload_model, fixed_batch=batch.inputs)


def choose_checkpoint(run_dir: Path) -> Checkpoint:
    """The best checkpoint of a run by its watched score, else the newest. Raises DataError if there is none."""
    store = CheckpointStore(run_dir / CHECKPOINTS)
    newest, _ = store.newest()
    if newest is None:
        raise DataError("the run has no checkpoint yet", where=str(run_dir))
    chosen = best_step(newest.state["best"], newest.state["best_value"])
    return newest if chosen is None else store.open(chosen)


def write_summary(session: Session, last_step: int, chosen: int, scores: dict[str, float]) -> None:
    progress, totals = session.progress, session.records.totals()
    wall_time_s = progress.wall_time_s + time.monotonic() - session.started
    summary: dict[str, Any] = {
        "steps": last_step,
        "exported_step": chosen,
        "best": progress.best,
        "test": scores,
        "target_tokens": totals.target_tokens,
        "tokens_per_second": totals.tokens_per_second,
        "effective_training_time_ratio": totals.step_seconds / wall_time_s,
        "peak_memory_bytes": peak_memory_bytes(session.processes.device),
        "wall_time_s": wall_time_s,
        "restarts": progress.restarts,
    }
    write_json(session.run_dir / "summary.json", summary)
