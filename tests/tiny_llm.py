"""Tiny decoder-only models with a real byte-level BPE tokeniser and a chat template, made in about a second each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.pairs import PAIRS

VOCAB_SIZE = 400
PAD, BOS, EOS, START, END = "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
OWN_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.1,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gemma": SHAPE | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "phi3": SHAPE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "original_max_position_embeddings": 256},
}  # fmt: skip


def make_tiny_llm(
    directory: Path, family: str = "llama", *, chat_template: str | None = CHATML, seed: int = 7, **changes: Any
) -> Path:
    """Writes config.json, model.safetensors and the tokeniser of a random model of a transformers model type.

    `changes` are keys of its config.json (llama, qwen2, qwen3, gpt2, mistral, gemma, phi3 are known to work).
    """
    directory.mkdir(parents=True)
    tokenizer = train_llm_tokenizer(chat_template)
    tokenizer.save_pretrained(directory)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    shape = OWN_SHAPES.get(family, SHAPE) | {"vocab_size": VOCAB_SIZE} | ids | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(directory)
    return directory


def train_llm_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE ids that knows the words of PAIRS; <s> and </s> are added by nobody."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = chat_template
    return tokenizer
