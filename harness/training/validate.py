"""Scores during training: evaluate, remember the best, decide when to stop."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from harness.data.encoded import EncodedRows
from harness.engine.gathered import whole_weights
from harness.errors import DataError
from harness.evaluation.decoded import Decoded
from harness.evaluation.evaluate import evaluate
from harness.evaluation.partial import Partial
from harness.evaluation.result import Evaluation, EvaluationInterrupted
from harness.io import heartbeat
from harness.io.faults import fault_point
from harness.scoring.scores import HIGHER_IS_BETTER, LABELS, one_line, sentence_statistics
from harness.scoring.significance import WrittenEvaluation, check_same_rows, paired_bootstrap
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
        update_best(session, result)
    if str(progress.step) in progress.best or session.saved_step == progress.step:
        save(session)
    return False


def evaluate_set(session: Session, name: str, rows: EncodedRows, num_rows: int | None = None) -> Evaluation:
    """Decode and score one set with the engine's weights, write its directory and records."""
    heartbeat.beat("evaluation")
    fault_point("evaluation")
    step = session.progress.step
    directory = evaluation_directory(session.run_dir, step, name)
    partial = Partial(directory.with_name(f".{directory.name}.partial"), "", session.processes)
    partial.remove_others(f".step-*-{name}.partial")
    with whole_weights(session.engine, session.processes) as has_all:
        result = evaluate(
            session.engine.module,
            rows,
            session.task,
            session.processes,
            config=session.config,
            num_rows=num_rows,
            synced=not has_all,
            stop_wanted=session.stop.wanted,
            partial=partial,
        )
    if session.processes.is_first:
        session.records.attempt("evaluations", lambda: result.write(directory))
    partial.remove()
    session.processes.barrier()
    values = {"sentences": result.num_rows, "decode_seconds": result.seconds, **result.values, **result.limits}
    session.records.evaluation(step, name, values, signatures=result.signatures)
    if samples := list(itertools.islice(result.samples(), NUM_SAMPLES)):
        session.records.samples(step, name, samples)
    session.records.images(step, name, result.images())
    return result


def evaluation_directory(run_dir: Path, step: int, name: str) -> Path:
    return run_dir / "evaluations" / f"step-{step:08d}-{name}"


def update_best(session: Session, result: Evaluation) -> None:
    """Note whether the score of this step is better than all before, or one of the `keep_best` best; a collective.

    A loss that is not finite is neither.
    """
    progress, metric, options = session.progress, session.config.watched_metric or "", session.config.early_stopping
    value, sign = result.values[metric], 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    is_better = math.isfinite(value) and (progress.best_value is None or sign * value > sign * progress.best_value)
    if is_better and progress.best_step is not None and options is not None and options.significance is not None:
        assert isinstance(result, Decoded), "config/task_rules.py"
        is_better = is_significant(session, result, metric, options.significance)
    if is_better:
        progress.best_step, progress.best_value, progress.evaluations_without_gain = progress.step, value, 0
    else:
        progress.evaluations_without_gain += 1
    if math.isfinite(value):
        scored = {**progress.best, str(progress.step): value}
        ranked = sorted(scored.items(), key=lambda item: (int(item[0]) != progress.best_step, -sign * item[1]))
        progress.best = dict(ranked[: session.config.checkpoint.keep_best])


def is_significant(session: Session, result: Decoded, metric: str, limit: float) -> bool:
    """Whether the score differs from that of the best step with a p below `limit`; a collective.

    If the outputs of the best step cannot be had any more, the scores alone decide, and the log says so.
    """
    step, best_step = session.progress.step, session.progress.best_step or 0
    p = None
    if session.processes.is_first:
        directory = evaluation_directory(session.run_dir, best_step, "validation")
        try:
            p = p_against(directory, result, metric)
        except DataError as error:
            session.records.note(f"step {step:,}: compared with step {best_step:,} by the score alone ({error.what})")
    p = session.processes.gather(p)[0]
    if p is None or p < limit:
        return True
    label = LABELS[metric]
    session.records.note(f"step {step:,}: {label} is better than at step {best_step:,}, not significantly (p {p:.3f})")
    return False


def p_against(directory: Path, result: Decoded, metric: str) -> float:
    """p of a paired bootstrap against written outputs. Raises DataError if they are not to be had, or of other rows."""
    best = WrittenEvaluation.read(directory)
    check_same_rows(best, [one_line(text) for text in result.references], "the validation set")
    language = result.scores.target_language
    baseline = sentence_statistics(metric, best.hypotheses, best.references, target_language=language)
    return paired_bootstrap(baseline, result.scores.statistics[metric]).p


def kept_best(best: dict[str, float], best_step: int | None) -> int | None:
    """The step of the best checkpoint; None if no evaluation has chosen one, or none is kept (`keep_best: 0`)."""
    return best_step if str(best_step) in best else None


def should_stop_early(session: Session) -> bool:
    options = session.config.early_stopping
    return options is not None and session.progress.evaluations_without_gain >= options.patience
