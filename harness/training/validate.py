"""Scores during training: evaluate, remember the best, decide when to stop."""

from __future__ import annotations

import itertools
from pathlib import Path

from harness.data.encoded import EncodedRows
from harness.evaluation.evaluate import evaluate
from harness.evaluation.result import Evaluation, EvaluationInterrupted
from harness.evaluation.scores import HIGHER_IS_BETTER
from harness.io import heartbeat
from harness.io.faults import fault_point
from harness.training.session import Session, save

NUM_SAMPLES = 10  # shown in TensorBoard


def evaluate_validation(session: Session) -> bool:
    """Score the validation set at the current step, save that if it is among the best; a collective.

    Returns True when a stop was agreed on meanwhile; the evaluation is then made again after the restart.
    """
    progress, options = session.progress, session.config.evaluation
    rows = session.rows.validation
    if rows is None or options is None or progress.evaluated_step == progress.step:
        return False
    try:
        result = evaluate_set(session, "validation", rows, num_rows=options.max_rows)
    except EvaluationInterrupted:
        return True
    progress.evaluated_step = progress.step
    if progress.step:
        update_best(session, result.values[session.config.watched_metric or ""])
    if str(progress.step) in progress.best or session.saved_step == progress.step:
        save(session)
    return False


def evaluate_set(session: Session, name: str, rows: EncodedRows, num_rows: int | None = None) -> Evaluation:
    """Decode and score one set with the engine's weights, write its directory and records."""
    heartbeat.beat("evaluation")
    fault_point("evaluation")
    step = session.progress.step
    directory = evaluation_directory(session.run_dir, step, name)
    result = evaluate(
        session.engine.module,
        rows,
        session.task,
        session.processes,
        config=session.config,
        num_rows=num_rows,
        synced=session.is_parameter_sharded,
        stop_wanted=session.stop.wanted,
        partial=directory.with_name(f".{directory.name}.partial"),
    )
    if session.processes.is_first:
        session.records.attempt("evaluations", lambda: result.write(directory))
    session.processes.barrier()
    values = {"sentences": result.num_rows, "decode_seconds": result.seconds, **result.values}
    session.records.evaluation(step, name, values, signatures=result.signatures)
    if samples := list(itertools.islice(result.samples(), NUM_SAMPLES)):
        session.records.samples(step, name, samples)
    session.records.images(step, name, result.images())
    return result


def evaluation_directory(run_dir: Path, step: int, name: str) -> Path:
    return run_dir / "evaluations" / f"step-{step:08d}-{name}"


def update_best(session: Session, value: float) -> None:
    """Note the score of this step, and whether it is one of the `keep_best` best so far."""
    progress = session.progress
    sign = 1.0 if HIGHER_IS_BETTER[session.config.watched_metric or ""] else -1.0
    if progress.best_value is None or sign * value > sign * progress.best_value:
        progress.best_value, progress.evaluations_without_gain = value, 0
    else:
        progress.evaluations_without_gain += 1
    ranked = sorted({**progress.best, str(progress.step): value}.items(), key=lambda item: sign * item[1], reverse=True)
    progress.best = dict(ranked[: session.config.checkpoint.keep_best])


def best_step(best: dict[str, float], best_value: float | None) -> int | None:
    """The step of the best kept checkpoint, or None if no evaluation has chosen one."""
    return next((int(step) for step, value in best.items() if value == best_value), None)


def should_stop_early(session: Session) -> bool:
    options = session.config.early_stopping
    return options is not None and session.progress.evaluations_without_gain >= options.patience
