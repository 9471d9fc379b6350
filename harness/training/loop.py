"""The run as one plain loop: global batch, micro-batches, optimizer step, records; evaluate, save, stop."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch

from harness.data.loader import StepRows
from harness.engine.build import StepOutcome, apply_gradients
from harness.engine.measure import copy_masters, peak_memory_bytes, update_to_weight_ratio
from harness.errors import NonFiniteError
from harness.io import heartbeat
from harness.io.atomic import write_json
from harness.io.faults import fault_point
from harness.plan.schedule import learning_rate
from harness.training.session import Session, change_phase, save
from harness.training.stop import stopped
from harness.training.validate import evaluate_validation, should_stop_early

MAX_SKIPPED_IN_A_ROW = 3


class StepSums(NamedTuple):
    """Sums over all micro-batches of all ranks of one global batch."""

    loss: float
    nll: float
    padded_tokens: float
    tokens: float
    stops_wanted: float


def train(session: Session) -> None:
    """Run optimizer steps until the schedule ends, a score stops improving, or a stop is agreed on.

    Raises Interrupted when any rank was asked to stop and the present step is saved, NonFiniteError after several steps
    in a row whose gradient was not finite.
    """
    config, progress = session.config, session.progress
    skipped = 0
    if session.processes.sum([session.stop.wanted()])[0] or evaluate_if_due(session):
        raise stopped(progress.step)
    for batch in session.steps.starting_at(progress.step + 1):
        if progress.step >= session.total_steps or should_stop_early(session):
            break
        started = time.monotonic()
        rate = learning_rate(
            batch.step, peak=config.optimizer.lr, total_steps=session.total_steps, schedule=config.schedule
        )
        is_logged = batch.step % config.monitor.log_every_steps == 0 or batch.step == 1
        before = copy_masters(session.engine) if is_logged else None
        sums = accumulate(session, batch)
        outcome = apply_gradients(session.engine, rate)
        if session.rank_allocator is not None:
            session.rank_allocator.after_step(batch.step, applied=outcome.applied)
        fault_point("step")
        ratio = update_to_weight_ratio(session.engine, before, session.processes) if before is not None else None
        progress.step = batch.step
        heartbeat.beat("step", batch.step)
        record_step(session, batch, sums, outcome, rate=rate, ratio=ratio, seconds=time.monotonic() - started)
        skipped = 0 if outcome.applied else skipped + 1
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            give_up(session, batch, skipped)
        stopping = sums.stops_wanted > 0 or evaluate_if_due(session)
        if stopping or is_due(batch.step, config.checkpoint.every_steps):
            save(session)
        if stopping:
            raise stopped(batch.step)
        if batch.step in session.phase_boundaries:
            change_phase(session)


def accumulate(session: Session, batch: StepRows) -> StepSums:
    """Forward and backward over this rank's micro-batches.

    Each loss is (sum over the micro-batch) x world_size / (target tokens of the global batch): DeepSpeed averages over
    ranks, so the gradient is that of the global sum divided once by the global token count.
    """
    engine, processes, task = session.engine, session.processes, session.task
    engine.train()
    losses = torch.zeros(2, dtype=torch.float64, device=processes.device)  # read once, after the last micro-step
    padded_tokens = tokens = 0
    for micro_step, parts in enumerate(batch.micro_batches):
        heartbeat.beat("step")
        examples = task.collate(session.rows.train.take(parts[processes.rank]), processes.device)
        # Dropout follows from (seed, step, micro-batch), so a resumed run draws what the unbroken run drew.
        torch.manual_seed(
            dropout_seed(session.config.seed, batch.step, micro_step * processes.world_size + processes.rank)
        )
        terms = task.loss(engine(**examples.inputs).logits, examples)
        engine.backward(terms.loss_sum * (processes.world_size / batch.target_tokens), scale_wrt_gas=False)
        losses += torch.stack([terms.loss_sum.detach(), terms.nll_sum])
        padded_tokens += examples.num_padded_tokens
        tokens += examples.num_tokens
    return StepSums(*processes.sum([*losses.tolist(), padded_tokens, tokens, session.stop.wanted()]))


def dropout_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def evaluate_if_due(session: Session) -> bool:
    """Score the present step if the run file wants it and it has not been; True when a stop was agreed on meanwhile."""
    options, step = session.config.evaluation, session.progress.step
    if options is None:
        return False
    wanted = is_due(step, options.every_steps) if step else options.initial
    return wanted and evaluate_validation(session)


def record_step(
    session: Session,
    batch: StepRows,
    sums: StepSums,
    outcome: StepOutcome,
    *,
    rate: float,
    ratio: float | None,
    seconds: float,
) -> None:
    values = {
        "loss": sums.loss / batch.target_tokens,
        "nll": sums.nll / batch.target_tokens,
        "learning_rate": rate,
        "grad_norm": outcome.grad_norm,
        "target_tokens": batch.target_tokens,
        "rows": len(batch.rows),
        "tokens_per_second": batch.target_tokens / seconds,
        "padding_fraction": 1.0 - sums.tokens / sums.padded_tokens,
        "row_digest": batch.digest,
        "peak_memory_bytes": peak_memory_bytes(session.processes.device),
        "epoch": batch.epoch,
    }
    if ratio is not None:
        values["update_to_weight_ratio"] = ratio
    session.records.step(batch.step, values)
    if not outcome.applied:
        reason = "the gradient is not finite; the step was applied on no rank"
        session.records.event("skip", batch.step, reason=reason, world_size=session.processes.world_size)


def give_up(session: Session, batch: StepRows, skipped: int) -> None:
    """Stop after `skipped` bad steps: the weights are still those of the last good one."""
    path = session.run_dir / "nonfinite.json"
    if session.processes.is_first:
        write_json(path, {"step": batch.step, "rows": batch.rows.tolist()})
    raise NonFiniteError(
        f"the gradient was not finite for {skipped} steps in a row, up to step {batch.step}",
        where=str(path),
        hint="lower optimizer.lr, use float32 or bfloat16, or look at the rows listed in that file",
    )
