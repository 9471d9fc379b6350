"""Models and tokenisers from a directory or hub name: safetensors only, no remote code, float32 master weights."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.utils import logging

from harness.config.schema import ModelConfig
from harness.errors import ConfigError, DataError
from harness.io.atomic import sha256_file
from harness.models.families import Family, check_model_type, family_of
from harness.models.screen import TOKENIZER_FILES, screen_model_directory

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", *TOKENIZER_FILES, "target.spm"]
logging.disable_progress_bar()
# Marian's tokeniser recommends a package that it then has no use for.
warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")

LAYER_DROP = ("encoder_layerdrop", "decoder_layerdrop")


def model_directory(name: str) -> Path:
    """The local directory of a model; a hub name is fetched first (its safe files only), anything else stays offline.

    Raises DataError if there is no such directory and the hub does not give it.
    """
    path = Path(name).expanduser()
    if path.is_dir() or not HUB_NAME.fullmatch(name):
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises errors of many libraries
        reason = str(error).strip().partition("\n")[0]
        what = f"neither a directory nor obtainable from the hub: {reason}"
        raise DataError(what, where=name, hint="download the model first and give its directory") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokeniser of a model directory. Raises DataError if it is missing or cannot be read."""
    directory = model_directory(str(path))
    screen_model_directory(directory, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenisers raise plain Exception
        raise DataError(f"the tokeniser cannot be read: {error}", where=str(directory)) from error
    if type(tokenizer).__name__ == "NllbTokenizer" and not (directory / "tokenizer.json").is_file():
        # From the sentencepiece file alone transformers 5.23 puts <mask> before the tags: each is off by one.
        raise DataError("an NLLB tokeniser needs its tokenizer.json", where=str(directory), hint="copy that file too")
    return tokenizer


def load_family(path: str | Path) -> tuple[Family, PreTrainedTokenizerBase]:
    """The family and tokeniser of a model directory. Raises DataError if they do not fit the model."""
    directory = model_directory(str(path))
    config = _load_config(directory, weights=False)
    tokenizer = load_tokenizer(directory)
    family = family_of(config.to_dict(), tokenizer)
    _check_fit(config, family, tokenizer, directory)
    return family, tokenizer


def load_model(model: ModelConfig, seed: int, *, device: str = "cpu") -> PreTrainedModel:
    """The model in float32, in training mode: from `model.path`, or with random weights that depend on `seed` only.

    On the device "meta" no weight is read; names and shapes are still compared with config.json.
    Layer drop is switched off: each rank would skip other layers, and under ZeRO-3 wait for ever.
    Raises DataError if the files are wrong, ConfigError if the model cannot do what `model` asks for.
    """
    directory = model_directory(model.path or model.config or "")
    config = _load_config(directory, weights=model.path is not None)
    _override(config, model)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": model.attention}
    try:
        network = _pretrained_model(directory, options, device) if model.path else _random_model(options, seed, device)
    except DataError:
        raise
    except Exception as error:  # validation raises errors of several libraries
        reason = f"the model cannot be built: {error}"
        if model.attention == "flash_attention_2":
            raise ConfigError(reason, where="model.attention", hint="use sdpa") from error
        raise DataError(reason, where=str(directory)) from error
    if model.gradient_checkpointing:
        enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    for module in network.modules():
        if isinstance(module, MarianSinusoidalPositionalEmbedding):
            # Fixed and never saved, but thawed by loading: weight decay would change what no export has.
            module.requires_grad_(False)
        if isinstance(module, M2M100SinusoidalPositionalEmbedding):
            # A buffer, which DeepSpeed leaves in float32: added to bfloat16 embeddings it would make float32 of them.
            module.to(getattr(torch, model.dtype))
    return network.train()


def reload_model(directory: Path) -> PreTrainedModel:
    """A written model directory as a user's plain transformers opens it, in the dtype it was written in."""
    return AutoModelForSeq2SeqLM.from_pretrained(directory, local_files_only=True)


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """State-dict name of each shared parameter -> name of the one it is shared with, which alone is saved."""
    return dict(model.all_tied_weights_keys)


def _load_config(directory: Path, *, weights: bool) -> PreTrainedConfig:
    """The screened config.json. Raises DataError if it is of no supported family or not valid."""
    check_model_type(screen_model_directory(directory, weights=weights).get("model_type"))
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # validation raises errors of several libraries
        raise DataError(f"not a valid configuration: {error}", where=str(directory / "config.json")) from error


def _override(config: PreTrainedConfig, model: ModelConfig) -> None:
    """Sets the dropout rates asked for, under the names that the family uses."""
    for name in LAYER_DROP:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    single_rate = hasattr(config, "dropout_rate")
    if model.dropout is not None:
        setattr(config, "dropout_rate" if single_rate else "dropout", model.dropout)
    if model.attention_dropout is not None:
        if single_rate:
            what = f"{config.model_type} has one dropout rate for everything"
            raise ConfigError(what, where="model.attention_dropout", hint="set model.dropout instead")
        config.attention_dropout = model.attention_dropout


def _random_model(options: dict[str, Any], seed: int, device: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForSeq2SeqLM.from_config(**options)


def _pretrained_model(directory: Path, options: dict[str, Any], device: str) -> PreTrainedModel:
    """Raises DataError if a weight is missing or has another shape: it must not be drawn at random in silence."""
    options |= {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if device != "cpu":
        options["device_map"] = device
    model, info = AutoModelForSeq2SeqLM.from_pretrained(directory, **options)
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            names = ", ".join(sorted(str(name) for name in info[what])[:5])
            message = f"{len(info[what])} weights do not fit config.json ({what.replace('_', ' ')}): {names}"
            raise DataError(message, where=str(directory), hint="config.json and weights are of different models")
    return model


def _check_fit(config: PreTrainedConfig, family: Family, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Raises DataError if the tokeniser has ids that the model has no embedding for, or another padding id."""
    sides = [(tokenizer.get_vocab() | family.languages(tokenizer), config.vocab_size)]
    if getattr(tokenizer, "separate_vocabs", False):
        sides.append((tokenizer.target_encoder, config.decoder_vocab_size or config.vocab_size))
    for vocabulary, vocab_size in sides:
        if (largest := max(vocabulary.values())) >= vocab_size:
            what = f"the tokeniser has the id {largest}, the model only {vocab_size} embeddings (vocab_size)"
            raise DataError(what, where=str(directory), hint="the tokeniser belongs to another model")
    for name in ("pad_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(config, name)
        if ours is None or ours not in (theirs if isinstance(theirs, list) else [theirs]):
            what = f"{name} is {ours} in the tokeniser and {theirs} in config.json"
            raise DataError(what, where=str(directory), hint="the tokeniser belongs to another model")


def tokenizer_fingerprint(path: str | Path) -> str:
    """Hash over the files that decide how text becomes token ids: the tokeniser's and config.json."""
    directory = model_directory(str(path))
    names = {*TOKENIZER_FILES, "target.spm", "tokenizer_config.json", "config.json"}
    files = sorted(file for file in directory.iterdir() if file.name in names)
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()
