"""Tiny pretrained bases without a classification head, one per architecture, with real tokenisers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from tests.pairs import PAIRS
from tests.tiny import make_tiny_model
from tests.tiny_llm import make_tiny_llm

FAMILIES = ["bert", "llama", "gpt2", "bart", "mbart", "t5"]


def make_base(family: str, directory: Path) -> Path:
    """A pretrained base without a classification head."""
    if family in ("mbart", "t5"):
        return make_tiny_model(family, directory)
    if family in ("llama", "gpt2"):
        return make_tiny_llm(directory, family)
    return make_tiny_bert(directory) if family == "bert" else make_tiny_bart(directory)


def make_tiny_bert(directory: Path) -> Path:
    """Without a pooler, as a model trained on masked tokens is."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str(" ".join(text for pair in PAIRS for text in pair))
    words = {word for word, _ in splitter.pre_tokenize_str(text)}
    letters = {letter for word in words for letter in word}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # By hand: the trainer of word pieces gives another vocabulary each time.
    pieces = [*special, *sorted(letters | words | {f"##{letter}" for letter in letters})]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2, **shape)
        BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def make_tiny_bart(directory: Path) -> Path:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text for pair in PAIRS for text in pair],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.save_pretrained(directory)
    layers = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = BartConfig(vocab_size=len(tokenizer), init_std=0.2, **layers, **sizes)
        BartForConditionalGeneration(config).save_pretrained(directory)
    return directory
