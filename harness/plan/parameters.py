"""Tensor shapes of a model by arithmetic on its config.json: no torch, no weights.

Counts trainable parameters as ``transformers`` builds the model (tied tensors once); a test compares every family with
the real modules. Marian's sinusoidal positions are fixed and not counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.io.atomic import read_json
from harness.plan.zero import Shapes

ModelJson = dict[str, Any]


def model_json(name_or_directory: str) -> ModelJson | None:
    """config.json of a model directory, or of a hub model if it was downloaded before; else None. Raises DataError."""
    directory = Path(name_or_directory)
    path = directory / "config.json" if directory.is_dir() else _cached_hub_file(name_or_directory)
    if path is None:
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError("must hold a JSON object", where=str(path))
    return content


def parameter_shapes(model: ModelJson) -> Shapes:
    """How often each tensor shape occurs. Raises DataError for an unknown family or a missing size."""
    family = model.get("model_type")
    if family not in _FAMILIES:
        raise DataError(f"model_type {family!r} is not supported", hint=f"supported: {', '.join(_FAMILIES)}")
    try:
        return _FAMILIES[family](model)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"config.json of a {family} model lacks a usable size: {error}") from error


def position_limit(model: ModelJson) -> int | None:
    """Longest input in tokens, for families with a table of positions."""
    limit = model.get("max_position_embeddings") if model.get("model_type") in ("mbart", "marian") else None
    return int(limit) if limit is not None else None


def _cached_hub_file(name: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    model = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    try:
        snapshot = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = model / "snapshots" / snapshot / "config.json"
    return path if path.is_file() else None


def _linear(outputs: int, inputs: int) -> Shapes:
    return Counter({(outputs, inputs): 1}) + Counter({(outputs,): 1})


def _times(shapes: Shapes, count: int) -> Shapes:
    return Counter({shape: number * count for shape, number in shapes.items()})


def _bart_like(model: ModelJson, *, learned_positions: bool, embedding_norm: bool, final_norm: bool) -> Shapes:
    """Transformer of Vaswani et al. (2017) with biases and LayerNorm, as BART has it."""
    width = model["d_model"]
    norm: Shapes = Counter({(width,): 2})
    attention = _times(_linear(width, width), 4) + norm
    shapes: Shapes = Counter()
    for side, num_attentions in (("encoder", 1), ("decoder", 2)):
        hidden = model[f"{side}_ffn_dim"]
        layer = _times(attention, num_attentions) + _linear(hidden, width) + _linear(width, hidden) + norm
        shapes += _times(layer, model[f"{side}_layers"])
        shapes += _times(norm, embedding_norm + final_norm)
        if learned_positions:
            shapes += Counter({(model["max_position_embeddings"] + 2, width): 1})
    return shapes


def _tied_embeddings(model: ModelJson) -> Shapes:
    """One shared table; untied: shared, encoder, decoder and output tables."""
    return Counter({(model["vocab_size"], model["d_model"]): 1 if model.get("tie_word_embeddings", True) else 4})


def _mbart(model: ModelJson) -> Shapes:
    body = _bart_like(model, learned_positions=True, embedding_norm=True, final_norm=True)
    return body + _tied_embeddings(model)


def _m2m_100(model: ModelJson) -> Shapes:
    body = _bart_like(model, learned_positions=False, embedding_norm=False, final_norm=True)
    return body + _tied_embeddings(model)


def _marian(model: ModelJson) -> Shapes:
    width, tied = model["d_model"], model.get("tie_word_embeddings", True)
    if model.get("share_encoder_decoder_embeddings", True):
        embeddings = _tied_embeddings(model)
    else:
        target = model.get("decoder_vocab_size") or model["vocab_size"]
        embeddings = Counter({(model["vocab_size"], width): 1}) + Counter({(target, width): 1 if tied else 2})
    return _bart_like(model, learned_positions=False, embedding_norm=False, final_norm=False) + embeddings


def _t5(model: ModelJson) -> Shapes:
    """T5 and mT5: no biases, RMSNorm, relative positions in the first layer of each side, tied output."""
    width, hidden = model["d_model"], model["d_ff"]
    inner = model["d_kv"] * model["num_heads"]
    attention: Shapes = Counter({(inner, width): 3}) + Counter({(width, inner): 1}) + Counter({(width,): 1})
    gated = model.get("feed_forward_proj", _T5_FEED_FORWARD[model["model_type"]]).startswith("gated-")
    forward: Shapes = Counter({(hidden, width): 1 + gated}) + Counter({(width, hidden): 1}) + Counter({(width,): 1})
    positions = (model.get("relative_attention_num_buckets", 32), model["num_heads"])
    num_encoder_layers = model["num_layers"]
    num_decoder_layers = model.get("num_decoder_layers") or num_encoder_layers
    shapes: Shapes = Counter({(model["vocab_size"], width): 1}) + Counter({positions: 2}) + Counter({(width,): 2})
    shapes += _times(attention + forward, num_encoder_layers)
    return shapes + _times(attention + attention + forward, num_decoder_layers)


_T5_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}
_FAMILIES: dict[str, Callable[[ModelJson], Shapes]] = {
    "mbart": _mbart,
    "m2m_100": _m2m_100,
    "marian": _marian,
    "t5": _t5,
    "mt5": _t5,
}
