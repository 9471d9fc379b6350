"""A narrow copy of a model directory with random weights: what a rehearsal trains in place of the real model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from harness.config.schema import Task
from harness.errors import DataError
from harness.models.load import AUTO_MODELS, load_config, model_directory
from harness.models.screen import JSON_FILES, TOKENIZER_COMPANIONS, TOKENIZER_FILES

_HEADS, _HEAD_SIZE, _INNER = 4, 16, 128
_WIDTH = _HEADS * _HEAD_SIZE
_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "dim")
# Sizes by the names that families give them. Vocabulary, positions and number of layers stay: freezing rules, adapters'
# targets and row lengths of the run file must fit as they fit the real model.
_SIZES = {
    **dict.fromkeys((*_WIDTH_NAMES, "word_embed_proj_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(("head_dim", "d_kv"), _HEAD_SIZE),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner"), _INNER),
    "hidden_dim": _INNER,  # of DistilBERT's feed-forward layers
}


def shrink_model(source: str, directory: Path, task: Task, *, seed: int) -> int:
    """Write a model of the family and with the tokeniser of `source` (a directory or hub name) to `directory`.

    Returns its number of parameters. A model that is no wider keeps its shape. Raises DataError if `source` is no model
    for the task, or of a family whose sizes do not go together when they are small.
    """
    origin = model_directory(source)
    config = load_config(origin, task, weights=False)
    text = config.get_text_config()
    changes = _changes(text.to_dict())
    for name, value in changes.items():
        setattr(text, name, value)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AUTO_MODELS[task].from_config(config, dtype=torch.float32)
    except Exception as error:  # each family has its own ideas of what does not fit
        what = f"no small copy can be made of this model: {error}"
        raise DataError(
            what, where=str(origin), hint="rehearse with a small model of the family as model.path"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, *TOKENIZER_COMPANIONS, *JSON_FILES):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, directory / name)
    model.save_pretrained(directory)
    return int(model.num_parameters())


def _changes(sizes: dict[str, Any]) -> dict[str, int]:
    """The sizes that become others; none if the model is no wider than the copy would be."""
    if all((sizes.get(name) or 0) <= _WIDTH for name in _WIDTH_NAMES):
        return {}
    changes = {name: value for name, value in _SIZES.items() if isinstance(sizes.get(name), int)}
    groups = sizes.get("num_key_value_heads")
    if isinstance(groups, int):
        is_grouped = groups < sizes.get("num_attention_heads", groups)
        changes["num_key_value_heads"] = _HEADS // 2 if is_grouped else _HEADS
    return changes
