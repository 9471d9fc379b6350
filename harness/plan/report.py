"""A plan in words."""

from __future__ import annotations

import json
from collections.abc import Iterator

from harness.plan.advice import Candidate, shown_bytes
from harness.plan.plan import Plan
from harness.plan.zero import zero_stage

_KINDS = {
    "weights": "trained weights",
    "frozen_weights": "frozen weights",
    "quantized_weights": "quantised weights",
    "gradients": "gradients",
    "master_weights": "float32 master weights",
    "optimizer_states": "optimizer states",
}
_PLACES = {"device": "device", "host": "host memory", "nvme": "NVMe"}


def describe(plan: Plan, candidates: list[Candidate], *, device_bytes: int | None) -> str:
    """The text of ``harness plan``."""
    return "\n".join(
        [*_batches(plan), "", *_memory(plan), "", *_advice(plan, candidates, device_bytes), "", *_deepspeed(plan)]
    )


def _batches(plan: Plan) -> Iterator[str]:
    batches, config = plan.batches, plan.config
    yield f"run        {plan.run_dir}"
    yield f"ranks      {plan.world_size}"
    yield (
        f"batch      {batches.tokens_per_step:,} tokens per step; micro-batches of at most "
        f"{batches.max_tokens_per_device:,} per rank: {batches.least_micro_steps} micro-steps per step or more"
    )
    if batches.steps is not None:
        yield f"length     {batches.steps:,} steps, {batches.total_tokens:,} tokens; epochs follow from the data"
    else:
        yield f"length     {batches.epochs:g} epochs; steps follow from the data"
    schedule = config.schedule
    yield f"schedule   {schedule.name}, warm-up {schedule.warmup_steps:,} steps, peak {config.optimizer.lr:g}"
    for warning in plan.warnings:
        yield f"warning    {warning}"


def _memory(plan: Plan) -> Iterator[str]:
    if plan.memory is None or plan.num_parameters is None or plan.num_trained is None:
        source = plan.config.model.path or plan.config.model.config
        yield f"memory     unknown: the config.json of {source} is not on this machine, or of a family not counted here"
        return
    parts = [f"{plan.num_parameters:,} parameters"]
    if plan.num_trained != plan.num_parameters:
        parts.append(f"{plan.num_trained:,} trained ({plan.num_trained / plan.num_parameters:.2%})")
    quantization = plan.config.model.quantization
    parts += [plan.config.model.dtype] if quantization is None else [f"{quantization.bits}-bit base"]
    yield f"model      {', '.join(parts)}, ZeRO stage {zero_stage(plan.deepspeed)}"
    yield "model states per rank:"
    for place, kinds in plan.memory.items():
        for kind, num_bytes in kinds.items():
            yield f"  {_KINDS[kind]:<24} {shown_bytes(num_bytes):>10}   {_PLACES[place]}"
    total = sum(plan.memory["device"].values())
    yield f"  {'on the device':<24} {shown_bytes(total):>10}   activations and buffers come on top"
    if plan.logits_bytes is not None:
        logits = shown_bytes(plan.logits_bytes)
        yield f"  {'logits of a micro-batch':<24} {logits:>10}   device, and as much for their gradient"
    if plan.checkpoint_bytes is not None:
        keep = plan.config.checkpoint.keep_last + plan.config.checkpoint.keep_best
        disk = shown_bytes(keep * plan.checkpoint_bytes)
        yield f"  {'a checkpoint':<24} {shown_bytes(plan.checkpoint_bytes):>10}   disk; up to {keep} are kept: {disk}"


def _advice(plan: Plan, candidates: list[Candidate], device_bytes: int | None) -> Iterator[str]:
    if not candidates:
        yield "recommended preset: unknown without the model's shapes"
        return
    yield f"{'preset':<16}{'device':>12}{'host':>12}{'NVMe':>12}   model states per rank"
    chosen = recommended(candidates)
    for candidate in candidates:
        sizes = (candidate.device_bytes, candidate.host_bytes, candidate.nvme_bytes)
        columns = "".join(f"{shown_bytes(size) if size else '-':>12}" for size in sizes)
        verdict = {None: "", True: "   fits", False: "   does not fit"}[candidate.fits]
        yield f"{candidate.preset:<16}{columns}{verdict}{'  <- recommended' if candidate is chosen else ''}"
    if device_bytes is None:
        yield "recommended preset: say --device-memory, for instance 80GiB"
    elif chosen is None:
        yield f"no preset fits {shown_bytes(device_bytes)}: use more devices, or lower `batch.max_tokens_per_device`"
    else:
        room = f"30 % of {shown_bytes(device_bytes)}"
        yield f"recommended preset: {chosen.preset}, the fastest that leaves {room} to activations"


def recommended(candidates: list[Candidate]) -> Candidate | None:
    """The first preset that fits."""
    return next((candidate for candidate in candidates if candidate.fits), None)


def _deepspeed(plan: Plan) -> Iterator[str]:
    yield "DeepSpeed configuration:"
    yield json.dumps(plan.deepspeed, indent=2)
