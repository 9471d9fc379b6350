"""From a checkpoint to a Hugging Face directory that plain transformers loads, compared before it is called done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint.state import CheckpointTensors
from harness.checkpoint.store import Checkpoint
from harness.engine.fragments import MASTER
from harness.errors import DataError
from harness.io import heartbeat
from harness.io.atomic import fsync_directory

TOKENIZER_CONFIG = "tokenizer_config.json"


def overwrite_parameters(model: torch.nn.Module, checkpoints: Sequence[Checkpoint]) -> None:
    """Give a float32 model the mean of the master weights of checkpoints, summed in float64.

    Besides the model two tensors are in memory at a time. Raises DataError if names or shapes differ.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    opened = [CheckpointTensors(checkpoint.directory) for checkpoint in checkpoints]
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for tensors in opened:
        there = {name: shape for (name, kind), shape in tensors.shapes.items() if kind == MASTER}
        if differing := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
            what = f"{len(differing)} parameters differ between model and checkpoint: {', '.join(differing[:5])}"
            raise DataError(what, where=str(tensors.directory))
    with torch.no_grad():
        for name, parameter in parameters.items():
            heartbeat.beat("save")
            mean = opened[0].whole(name).double()
            for tensors in opened[1:]:
                mean += tensors.whole(name)
            parameter.copy_(mean / len(opened))


def export(
    model: Any,
    tokenizer: Any,
    directory: Path,
    *,
    write: Callable[[Path], Any],
    reload: Callable[[Path], Any],
    fixed_batch: dict[str, Any],
    tolerance: float = 0.0,
) -> None:
    """`write` a model and its tokeniser into `directory`, atomically.

    `reload` opens the written directory as a user would; its logits on `fixed_batch` must equal those of the model in
    memory, element by element (or within `tolerance` times the largest), or nothing is left behind and DataError is
    raised.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    heartbeat.beat("save")
    tokenizer.save_pretrained(temporary)
    for weights in temporary.glob("*.safetensors"):  # written readable by their owner alone
        weights.chmod((temporary / TOKENIZER_CONFIG).stat().st_mode)
    with torch.no_grad():
        expected = model(**fixed_batch).logits
        actual = reload(temporary).eval()(**fixed_batch).logits
    difference = float((expected.float() - actual.float()).abs().max())
    if not difference <= tolerance * float(expected.float().abs().max()):
        shutil.rmtree(temporary)
        raise DataError(f"the exported model's logits differ by {difference:g} from the trained one's")
    fsync_directory(temporary)
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(temporary, directory)
    fsync_directory(directory.parent)
