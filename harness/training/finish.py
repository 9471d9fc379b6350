"""The end of a run: the best weights, the test scores, the exported model, the summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.checkpoint import state as checkpoint_state
from harness.checkpoint.export import export, overwrite_parameters
from harness.checkpoint.store import Checkpoint, CheckpointStore
from harness.config.schema import RunConfig
from harness.engine.measure import peak_memory_bytes
from harness.errors import DataError, Interrupted
from harness.evaluation.result import EvaluationInterrupted
from harness.io import heartbeat
from harness.io.atomic import write_json
from harness.models.assemble import assemble, load_with_adapter
from harness.models.load import reload_model
from harness.reports.report import finite
from harness.tasks.task import Task
from harness.training.merge import in_float32, merged
from harness.training.prepare import base_digest, model_source
from harness.training.session import CHECKPOINTS, Session, check_base, reopen_engine, save
from harness.training.validate import evaluate_set, evaluate_validation, kept_best

FIXED_LENGTHS = (3, 9, 17, 5)  # tokens of the rows on which an export is compared
PISSA_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


def finish(session: Session) -> None:
    """Save, go back to the best checkpoint, score the test set, export, and write summary.json; a collective.

    Raises Interrupted when a stop was agreed on meanwhile; the same command does what is missing.
    """
    progress = session.progress
    stopping = evaluate_validation(session)
    save(session)
    if stopping:
        raise _interrupted()
    chosen = kept_best(progress.best, progress.best_step) or progress.step
    last_step = progress.step
    scores = {}
    if session.rows.test is not None and session.config.evaluation is not None:
        try:
            if chosen != last_step:
                go_back(session, chosen)
            scores = evaluate_set(session, "test", session.rows.test).values
        except EvaluationInterrupted:
            raise _interrupted() from None
        finally:
            progress.step = last_step
    heartbeat.beat("save")
    if session.processes.is_first:
        checkpoint = session.store.open(chosen)
        export_checkpoint([checkpoint], session.config, session.task, session.run_dir / "export")
        write_summary(session, last_step, chosen, scores)
    session.processes.barrier()


def go_back(session: Session, step: int) -> None:
    """The weights of an earlier checkpoint, perhaps of a phase in which fewer parameters were trained."""
    heartbeat.beat("load")
    checkpoint = session.store.open(step)
    if session.phase_boundaries:
        reopen_engine(session, checkpoint)
    else:
        checkpoint_state.load(checkpoint, session.engine)
    session.progress.step = step


def _interrupted() -> Interrupted:
    return Interrupted("stopped during the last evaluation, all steps are saved", hint="run the same command again")


def export_checkpoint(
    checkpoints: Sequence[Checkpoint], config: RunConfig, task: Task, directory: Path, *, merge: bool = False
) -> str:
    """The model of a checkpoint as a Hugging Face directory in the run's dtype, or its adapter as PEFT reads it.

    Of several checkpoints, oldest first, the model has the mean of their weights.
    `merge`: the adapter is added into the weights of its base, which become a model of their own.
    Returns what was compared besides the logits of the written model, for the user. Raises DataError if the base is
    another one than in training.
    """
    digest = base_digest(config)
    for checkpoint in checkpoints:
        check_base(checkpoint, digest)
    as_plain_transformers = {"gradient_checkpointing": False, "attention": "sdpa", "neftune_alpha": None}
    config = config.model_copy(update={"model": config.model.model_copy(update=as_plain_transformers)})
    dtype = getattr(torch, config.model.dtype)
    if merge:
        config = in_float32(config)
    last_step = checkpoints[-1].step
    model = assemble(config, step=last_step - 1, total_steps=max(1, last_step)).model
    overwrite_parameters(model, checkpoints)
    inputs = fixed_inputs(task, model.config)
    if config.adapter is not None and not merge:
        from harness.models.adapter_files import save_adapter  # peft takes seconds to import

        base, read_as = model_source(config), config.model.model_dump(include={"dtype", "quantization"})
        export(
            model.eval(), task.tokenizer, directory, fixed_batch=inputs,
            write=lambda path: save_adapter(model, path, base=base, read_as=read_as),
            reload=lambda path: load_with_adapter(config, path),
            # What PiSSA takes out of the base at its start is added again in another order.
            tolerance=PISSA_TOLERANCE[dtype] if config.adapter.method == "pissa" else 0.0,
        )  # fmt: skip
        return ""
    comparison = ""
    if config.adapter is not None:
        model, comparison = merged(model, inputs, config, task)
    model = model.to(dtype).eval()
    export(
        model, task.tokenizer, directory, fixed_batch=inputs,
        write=model.save_pretrained, reload=lambda path: reload_model(path, config.task).to(dtype),
    )  # fmt: skip
    return comparison


def fixed_inputs(task: Task, model_config: Any) -> dict[str, Any]:
    """Rows of always the same tokens, drawn from the whole vocabulary: what an export is compared on."""
    generator = np.random.default_rng(0)
    vocab_size = model_config.get_text_config().vocab_size
    vocab_size = min(vocab_size, getattr(model_config, "decoder_vocab_size", None) or vocab_size)
    sides = [generator.integers(vocab_size, size=length).tolist() for length in FIXED_LENGTHS]
    return task.collate(task.made_up(sides), torch.device("cpu")).inputs


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
    chosen = kept_best(newest.state["best"], newest.state["best_step"])
    return newest if chosen is None else store.open(chosen)


def choose_to_average(
    run_dir: Path, *, num_last: int | None = None, best: bool = False, steps: Sequence[int] = ()
) -> list[Checkpoint]:
    """The `num_last` newest checkpoints, the `best` ones, or those of `steps`; else all. Oldest first.

    Raises DataError if they are not there, or fewer than two.
    """
    store = CheckpointStore(run_dir / CHECKPOINTS)
    present = store.steps()
    newest = store.newest()[0] if best else None
    if newest is not None:
        steps = [int(step) for step in newest.state["best"]]
    chosen = sorted(set(steps)) if best or steps else present[-(num_last or 0) :]
    missing = [step for step in chosen if step not in present]
    needed = max(2, num_last or 0)
    if missing or len(chosen) < needed:
        too_few = f"an average of {needed} checkpoints or more is wanted, and {len(chosen)} would be averaged"
        what = f"there is no checkpoint of step {missing[0]}" if missing else too_few
        there = f"there are: {', '.join(map(str, present)) or 'none'}"
        raise DataError(what, where=str(run_dir), hint=f"{there}; checkpoint.keep_last and keep_best keep more")
    return [store.open(step) for step in chosen]


def write_summary(session: Session, last_step: int, chosen: int, scores: dict[str, float]) -> None:
    progress, totals, stopping = session.progress, session.records.totals(), session.config.early_stopping
    wall_time_s = progress.wall_time_s + time.monotonic() - session.started
    summary: dict[str, Any] = {
        "steps": last_step,
        "total_steps": session.total_steps,
        "early_stopping": stopping and stopping.model_dump(mode="json"),
        "exported_step": chosen,
        "best": progress.best,
        "test": finite(scores),
        "target_tokens": totals.target_tokens,
        "tokens_per_second": totals.tokens_per_second,
        "effective_training_time_ratio": totals.step_seconds / wall_time_s,
        "peak_memory_bytes": peak_memory_bytes(session.processes.device),
        "wall_time_s": wall_time_s,
        "restarts": progress.restarts,
    }
    write_json(session.run_dir / "summary.json", summary)
