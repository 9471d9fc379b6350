"""Tiny real models with real tokenisers, one per family, made in about a second each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from harness.models.tokenizer import RECIPES, TextInput, train_tokenizer
from tests.pairs import PAIRS

NUM_PIECES = 300
LANGUAGES: dict[str, tuple[str | None, str | None]] = {
    "mbart": ("en_XX", "de_DE"),
    "mbart50": ("en_XX", "de_DE"),
    "nllb": ("eng_Latn", "deu_Latn"),
    "m2m100": ("en", "de"),
    "marian": (None, None),
    "t5": (None, None),
}

BART_SHAPE: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "scale_embedding": True,
    "init_std": 0.1,
}


def make_tiny_model(family: str, directory: Path, *, d_model: int = 32) -> Path:
    """Writes config.json, model.safetensors and the tokeniser of a random model that knows the words of PAIRS."""
    directory.mkdir(parents=True)
    corpus = directory.parent / f"{directory.name}.txt"
    corpus.write_text("".join(f"{source}\n{target}\n" for source, target in PAIRS), encoding="utf-8")
    vocab_size = RECIPES[family].num_reserved + NUM_PIECES
    tokenizer = train_tokenizer(family, [TextInput(corpus)], directory, vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        _model(family, tokenizer, vocab_size, d_model).save_pretrained(directory)
    return directory


def talkative(model: Path, directory: Path) -> Path:
    """The model with larger weights: its outputs differ from source to source and end in different places."""
    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.ndim == 2:
            weight.normal_(std=0.35, generator=generator)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _model(family: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, d_model: int) -> Any:
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": tokenizer.pad_token_id}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "d_model": d_model}
    if family == "t5":
        shape = {"d_kv": d_model // 2, "d_ff": 2 * d_model, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(**sizes, **shape, decoder_start_token_id=tokenizer.pad_token_id))
    shape = BART_SHAPE | {"encoder_ffn_dim": 2 * d_model, "decoder_ffn_dim": 2 * d_model}
    if family == "marian":
        start = {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
        return MarianMTModel(MarianConfig(**sizes, **start, **shape))
    if family in ("nllb", "m2m100"):
        return M2M100ForConditionalGeneration(M2M100Config(**sizes, **shape, decoder_start_token_id=2))
    start_id = 2 if family == "mbart50" else None
    return MBartForConditionalGeneration(MBartConfig(**sizes, **shape, decoder_start_token_id=start_id))
