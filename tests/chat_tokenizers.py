"""Word-level tokenisers that cut text and place special tokens as the families' own do, for their chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "golden" / "chat_templates"
WORDS = ["user", "system", "assistant", "model", "\n", "Be brief.", "Capital of France?", "And Spain?"]
WORDS += ["Paris.", "Madrid, of course.", "<think>\nEasy.\n</think>\n\n", "Hm", " \n"]

CHATML = ["<|im_start|>", "<|im_end|>"]
SPECIAL = {
    "qwen2_5": ["<|endoftext|>", *CHATML],
    "qwen3": ["<|endoftext|>", *CHATML, "<think>", "</think>"],
    "llama3": ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"],
    "phi3": ["<|endoftext|>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "mistral": ["</s>", "<s>", "[INST]", "[/INST]"],
    "deepseek_r1_distill": [
        "<\uff5cend▁of▁sentence\uff5c>",
        "<\uff5cbegin▁of▁sentence\uff5c>",
        "<\uff5cUser\uff5c>",
        "<\uff5cAssistant\uff5c>",
    ],
}


def chat_tokenizer(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokeniser of a family with the template of the same name, or with the one given."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _cutting(family)
    special = SPECIAL[family]
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*WORDS, *(f" {word}" for word in WORDS), *(f"\n{word}" for word in WORDS)], trainer)
    # Phi-3's tokens swallow the white space that follows them.
    tokenizer.add_special_tokens([AddedToken(token, rstrip=family == "phi3", normalized=False) for token in special])
    names: dict[str, Any] = {"unk_token": "<unk>", "eos_token": special[0]}
    if family not in ("qwen2_5", "qwen3"):
        names["bos_token"] = special[1]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template or (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return fast


WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of Llama 3 and Qwen


def _cutting(family: str) -> tuple[Any, Any]:
    """Normaliser and pre-tokeniser: byte-level, or as sentencepiece with spaces as ▁."""
    if family in ("qwen2_5", "qwen3", "llama3", "deepseek_r1_distill"):
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD), "isolated"), bytes_of])
    words = pre_tokenizers.Split(Regex(r"\n|▁?\w+|[^\w\s]"), "isolated")
    spaces = normalizers.Replace(" ", "▁")
    if family == "phi3":  # as in Llama 2, each text between special tokens gets a space in front
        return normalizers.Sequence([normalizers.Prepend("▁"), spaces]), words
    return spaces, words
