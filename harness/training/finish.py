"""The end of a run: the best weights, the test scores, the exported model, the summary."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint import state as checkpoint_state
from harness.checkpoint.export import export_model, overwrite_parameters
from harness.checkpoint.store import Checkpoint, CheckpointStore
from harness.config.schema import RunConfig
from harness.engine.measure import peak_memory_bytes
from harness.errors import DataError, Interrupted
from harness.evaluation.evaluate import EvaluationInterrupted
from harness.io.atomic import write_json
from harness.models.load import load_model, reload_model
from harness.tasks.translation import TranslationTask
from harness.training.session import CHECKPOINTS, Session, save
from harness.training.validate import best_step, evaluate_set, evaluate_validation

FIXED_LENGTHS = (3, 9, 17, 5)  # tokens of the rows on which an export is compared


def finish(session: Session) -> None:
    """Save, go back to the best checkpoint, score the test set, export, and write summary.json; a collective.

    Raises Interrupted when a stop was agreed on meanwhile; the same command does what is missing.
    """
    progress = session.progress
    stopping = evaluate_validation(session)
    save(session)
    if stopping:
        raise _interrupted()
    chosen = best_step(progress.best, progress.best_value) or progress.step
    last_step = progress.step
    if chosen != progress.step:
        checkpoint_state.load(session.store.open(chosen), session.engine)
        progress.step = chosen
    scores = {}
    if session.rows.test is not None and session.config.evaluation is not None:
        try:
            scores = evaluate_set(session, "test", session.rows.test).values
        except EvaluationInterrupted:
            raise _interrupted() from None
        finally:
            progress.step = last_step
    if session.processes.is_first:
        checkpoint = session.store.open(chosen)
        export_checkpoint(checkpoint, session.config, session.task, session.run_dir / "export")
        write_summary(session, last_step, chosen, scores)
    session.processes.barrier()


def _interrupted() -> Interrupted:
    return Interrupted("stopped during the last evaluation, all steps are saved", hint="run the same command again")


def export_checkpoint(checkpoint: Checkpoint, config: RunConfig, task: TranslationTask, directory: Path) -> None:
    """The model of a checkpoint as a Hugging Face directory in the run's dtype."""
    as_plain_transformers = {"gradient_checkpointing": False, "attention": "sdpa"}  # to compare with it bit for bit
    model = load_model(config.model.model_copy(update=as_plain_transformers), config.seed)
    overwrite_parameters(model, checkpoint)
    dtype, inputs = getattr(torch, config.model.dtype), fixed_inputs(task, model.config)
    export_model(model, task.tokenizer, directory, dtype=dtype, reload=reload_model, fixed_batch=inputs)


def fixed_inputs(task: TranslationTask, model_config: Any) -> dict[str, Tensor]:
    """Rows of always the same tokens, drawn from the whole vocabulary: what an export is compared on."""
    generator = np.random.default_rng(0)
    vocab_size = min(model_config.vocab_size, getattr(model_config, "decoder_vocab_size", None) or sys.maxsize)
    sides = [generator.integers(vocab_size, size=length).tolist() for length in FIXED_LENGTHS]
    start = task.tokenizer.eos_token_id
    examples = [(source, labels, start) for source, labels in zip(sides, reversed(sides), strict=True)]
    return task.collate(examples, torch.device("cpu")).inputs


def choose_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint:
    """That of `step`, else the best by the run's watched score, else the newest. Raises DataError if there is none."""
    store = CheckpointStore(run_dir / CHECKPOINTS)
    if step is not None:
        if step not in store.steps():
            hint = f"there are: {', '.join(map(str, store.steps())) or 'none'}"
            raise DataError(f"the run has no checkpoint of step {step}", where=str(run_dir), hint=hint)
        return store.open(step)
    newest, _ = store.newest()
    if newest is None:
        raise DataError("the run has no checkpoint yet", where=str(run_dir))
    chosen = best_step(newest.state["best"], newest.state["best_value"])
    return newest if chosen is None else store.open(chosen)


def write_summary(session: Session, last_step: int, chosen: int, scores: dict[str, float]) -> None:
    progress, totals, stopping = session.progress, session.records.totals(), session.config.early_stopping
    wall_time_s = progress.wall_time_s + time.monotonic() - session.started
    summary: dict[str, Any] = {
        "steps": last_step,
        "total_steps": session.total_steps,
        "early_stopping": stopping and stopping.model_dump(mode="json"),
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
