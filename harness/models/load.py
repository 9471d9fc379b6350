"""Models and tokenisers from a directory or hub name: safetensors only, no remote code, float32 master weights."""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.utils import logging

from harness.config.schema import ClassificationConfig, ModelConfig, QuantizationConfig, Task
from harness.errors import ConfigError, DataError, HarnessError
from harness.io.atomic import sha256_file
from harness.models.activations import apply_activation_options, override_dropout
from harness.models.families import Family, check_model_type, family_of
from harness.models.heads import head_names, set_labels
from harness.models.screen import TOKENIZER_COMPANIONS, TOKENIZER_FILES, screen_model_directory

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", *TOKENIZER_FILES, *TOKENIZER_COMPANIONS]
logging.disable_progress_bar()
# Tensor parallelism, which nobody has asked for: every weight "was not sharded".
logging.get_logger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
# When bitsandbytes is first imported: that a kernel of a package is missing which nobody has asked for.
logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.get_logger("transformers.modeling_utils").setLevel(logging.ERROR)  # of missing weights we tell ourselves
# Marian's tokeniser recommends a package that it then has no use for.
warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")

PACKED = ("Params4bit", "Int8Params")  # of bitsandbytes, which is not imported for their sake
LAYER_DROP = ("encoder_layerdrop", "decoder_layerdrop", "layerdrop")
AUTO_MODELS: dict[Task, Any] = {
    "translation": AutoModelForSeq2SeqLM,
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}


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


def load_matching_tokenizer(path: str | Path, task: Task) -> PreTrainedTokenizerBase:
    """The tokeniser of a model directory. Raises DataError if it has tokens that the model has no embedding for."""
    directory = model_directory(str(path))
    tokenizer = load_tokenizer(directory)
    config = load_config(directory, task, weights=False).get_text_config()
    _check_ids(tokenizer.get_vocab(), config.vocab_size, directory)
    return tokenizer


def load_family(path: str | Path) -> tuple[Family, PreTrainedTokenizerBase]:
    """The family and tokeniser of a model directory. Raises DataError if they do not fit the model."""
    directory = model_directory(str(path))
    config = load_config(directory, "translation", weights=False)
    tokenizer = load_tokenizer(directory)
    family = family_of(config.to_dict(), tokenizer)
    _check_fit(config, family, tokenizer, directory)
    return family, tokenizer


def load_model(
    model: ModelConfig,
    seed: int,
    *,
    task: Task = "translation",
    classification: ClassificationConfig | None = None,
    frozen: bool = False,
    device: str = "cpu",
) -> PreTrainedModel:
    """The model in training mode: from `model.path`, or with random weights that depend on `seed` only.

    Weights are float32, those of a base that stays `frozen` in the compute dtype, or quantised while they are read.
    A classification head that the files lack is drawn from `seed` too; `classification.labels` must be known.
    On the device "meta" no weight is read; names and shapes are still compared with config.json.
    Layer drop is switched off: each rank would skip other layers, and under ZeRO-3 wait for ever.
    Raises DataError if the files are wrong, ConfigError if the model cannot do what `model` asks for.
    """
    directory = model_directory(model.path or model.config or "")
    config = load_config(directory, task, weights=model.path is not None)
    for name in LAYER_DROP:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    override_dropout(config, model)
    if classification is not None:
        set_labels(config, classification, load_tokenizer(directory))
    dtype = getattr(torch, model.dtype) if frozen else torch.float32
    options = {"config": config, "dtype": dtype, "attn_implementation": model.attention}
    build = _pretrained_model if model.path else _random_model
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build(directory, task, options, device, model.quantization)
    except HarnessError:
        raise
    except Exception as error:  # validation raises errors of several libraries
        reason = f"the model cannot be built: {error}"
        if model.attention == "flash_attention_2":
            raise ConfigError(reason, where="model.attention", hint="use sdpa") from error
        raise DataError(reason, where=str(directory)) from error
    apply_activation_options(network, model)
    for module in network.modules():
        if isinstance(module, MarianSinusoidalPositionalEmbedding):
            # Fixed and never saved, but thawed by loading: weight decay would change what no export has.
            module.requires_grad_(False)
        if isinstance(module, M2M100SinusoidalPositionalEmbedding):
            # A buffer, which DeepSpeed leaves in float32: added to bfloat16 embeddings it would make float32 of them.
            module.to(getattr(torch, model.dtype))
    return network.train()


def is_decoder(directory: Path) -> bool:
    """Whether a model directory holds a causal language model."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return type(config) in AUTO_MODELS["causal_lm"]._model_mapping and not config.is_encoder_decoder


def as_dtype(model: Any, dtype: torch.dtype) -> Any:
    """`model` in place with every weight in `dtype` that is not stored in 4 or 8 bits; buffers, such as the frequencies
    of rotary positions, stay as they were loaded. DeepSpeed does the same to what it trains."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and type(parameter).__name__ not in PACKED:
            parameter.data = parameter.data.to(dtype)
    return model


def reload_model(directory: Path, task: Task) -> PreTrainedModel:
    """A written model directory as a user's plain transformers opens it, in the dtype it was written in."""
    return AUTO_MODELS[task].from_pretrained(directory, local_files_only=True)


def load_config(directory: Path, task: Task, *, weights: bool) -> PreTrainedConfig:
    """The screened config.json. Raises DataError if it is not valid or of no model that does the task."""
    content = screen_model_directory(directory, weights=weights)
    if task == "translation":
        check_model_type(content.get("model_type"))
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # validation raises errors of several libraries
        raise DataError(f"not a valid configuration: {error}", where=str(directory / "config.json")) from error
    if type(config) not in AUTO_MODELS[task]._model_mapping or (task == "causal_lm" and config.is_encoder_decoder):
        what = f"transformers has no {task} model of type {config.model_type!r}"
        raise DataError(what, where=str(directory / "config.json"))
    return config


def _random_model(
    directory: Path, task: Task, options: dict[str, Any], device: str, quantization: QuantizationConfig | None
) -> PreTrainedModel:
    """`directory` has the configuration; what is to be quantised is written and read again."""
    with torch.device(device):
        model = AUTO_MODELS[task].from_config(**options)
    if quantization is None or device == "meta":
        return model
    with tempfile.TemporaryDirectory() as copy:
        model.save_pretrained(copy)
        return _pretrained_model(Path(copy), task, options, device, quantization)


def _pretrained_model(
    directory: Path, task: Task, options: dict[str, Any], device: str, quantization: QuantizationConfig | None
) -> PreTrainedModel:
    """Raises DataError if a weight is missing or has another shape: it must not be drawn at random in silence.

    Only a classification head may be new: the base has none, or one for other labels.
    """
    options |= {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if device != "cpu":
        options["device_map"] = device
    if quantization is not None and device != "meta":
        from harness.models.quantization import quantized_model_options  # bitsandbytes takes seconds to import

        with torch.device("meta"):
            skeleton = AUTO_MODELS[task].from_config(options["config"])
        options |= quantized_model_options(quantization, options["dtype"], skeleton=skeleton, device=device)
    model, info = AUTO_MODELS[task].from_pretrained(directory, **options)
    if quantization is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():  # a single view of it would keep the whole file in memory
                tensor.data = tensor.data.clone()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU with AVX512-BF16, bitsandbytes would lay 4-bit weights out for inference at the first evaluation
            # and never back: the steps after it would have no gradient below the topmost layer.
            module.support_avx512bf16_for_cpu = False
    new = head_names(model) if task == "classification" else set()
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := sorted({key if isinstance(key, str) else key[0] for key in info[what]} - new):
            message = f"{len(wrong)} weights do not fit config.json ({what.replace('_', ' ')}): {', '.join(wrong[:5])}"
            raise DataError(message, where=str(directory), hint="config.json and weights are of different models")
    return model


def _check_fit(config: PreTrainedConfig, family: Family, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Raises DataError if the tokeniser has ids that the model has no embedding for, or another padding id."""
    sides = [(tokenizer.get_vocab() | family.languages(tokenizer), config.vocab_size)]
    if getattr(tokenizer, "separate_vocabs", False):
        sides.append((tokenizer.target_encoder, config.decoder_vocab_size or config.vocab_size))
    for vocabulary, vocab_size in sides:
        _check_ids(vocabulary, vocab_size, directory)
    for name in ("pad_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(config, name)
        if ours is None or ours not in (theirs if isinstance(theirs, list) else [theirs]):
            what = f"{name} is {ours} in the tokeniser and {theirs} in config.json"
            raise DataError(what, where=str(directory), hint="the tokeniser belongs to another model")


def _check_ids(vocabulary: dict[str, int], vocab_size: int, directory: Path) -> None:
    if (largest := max(vocabulary.values())) >= vocab_size:
        what = f"the tokeniser has the id {largest}, the model only {vocab_size} embeddings (vocab_size)"
        raise DataError(what, where=str(directory), hint="the tokeniser belongs to another model")


def base_fingerprint(path: str | Path) -> str:
    """Hash over the bytes of a model directory's safetensors files. All are read, several at a time, each once a
    process: about a second a GB for one core. The same weights cut into other files have another hash.

    Raises DataError if it has none.
    """
    directory = model_directory(str(path))
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError("an adapter needs a base with weights", where=str(directory))
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_hash_of_file, files, (file.stat().st_mtime_ns for file in files))
        lines = [f"{file.name} {file_hash}\n" for file, file_hash in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenizer_fingerprint(path: str | Path) -> str:
    """Hash over the files that decide how text becomes token ids: the tokeniser's and config.json."""
    directory = model_directory(str(path))
    names = {*TOKENIZER_FILES, *TOKENIZER_COMPANIONS, "tokenizer_config.json", "config.json"}
    files = sorted(file for file in directory.iterdir() if file.name in names)
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()


@cache
def _hash_of_file(file: Path, changed_at_ns: int) -> str:
    """`sha256_file`, made once for each time that the file has been changed at."""
    return sha256_file(file)
