"""Looks at a model directory before anything of it is loaded: safetensors only, no code, no paths out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harness.errors import DataError
from harness.io.atomic import read_json

WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_BASE = "base.json"  # ours
WEIGHTS_INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
)  # fmt: skip
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "source.spm",
    "vocab.json", "vocab.txt",
)  # fmt: skip
# What some tokenisers have beside one of these.
TOKENIZER_COMPANIONS = ("target.spm", "merges.txt", "chat_template.jinja")


def screen_model_directory(directory: Path, *, weights: bool) -> dict[str, Any]:
    """Returns config.json. Raises DataError if the directory is not a model that is safe to load.

    With `weights` its safetensors files must be there and whole; without, config.json and the tokeniser are enough.
    """
    if not directory.is_dir():
        raise DataError("no such model directory", where=str(directory))
    if is_adapter(directory):
        hint = "merge the adapter into its base model first"
        raise DataError("this is an adapter, not a model", where=str(directory), hint=hint)
    config = _screen_json(directory / "config.json")
    if "quantization_config" in config:
        hint = "give the original model; `model.quantization` quantises while it loads"
        raise DataError("the weights are quantised already", where=str(directory / "config.json"), hint=hint)
    for name in JSON_FILES:
        if (directory / name).exists():
            _screen_json(directory / name)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        hint = f"one of {', '.join(TOKENIZER_FILES)} is needed"
        raise DataError("there is no tokeniser", where=str(directory), hint=hint)
    if weights:
        for path in _weight_files(directory):
            _screen_weights(path)
    return config


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and not a whole model."""
    return (directory / ADAPTER_CONFIG).is_file()


def base_of_adapter(directory: Path) -> str:
    """Directory or hub name of an adapter's base. Raises DataError if the adapter does not say."""
    base = _screen_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise DataError("it does not name its base", where=str(directory / ADAPTER_CONFIG))
    return base


def types_of_base(directory: Path) -> dict[str, Any]:
    """`dtype` and `quantization` (as in the run file's `model`) that an adapter's base had in training, if it says."""
    path = directory / ADAPTER_BASE
    content = _screen_json(path) if path.is_file() else {}
    return {key: content[key] for key in ("dtype", "quantization") if key in content}


def _screen_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises DataError if a key in it would run code."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path))
    for key, value in _items(content):
        if key in CODE_KEYS and value:
            hint = "models with their own code are never loaded; remove the key if the model needs none"
            raise DataError(f"{key!r} asks for code to be run: {value!r}", where=str(path), hint=hint)
        if key.endswith(("attn_implementation", "_implementation_internal")) and "/" in str(value):
            raise DataError(f"{key!r} asks for code from a hub: {value!r}", where=str(path), hint="remove the key")
    return content


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON value, at any depth."""
    if isinstance(content, dict):
        yield from content.items()
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _items(value)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model. Raises DataError if there are none or the index names something else."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            hint = "pickle files can run code and are never read: convert them with safetensors' convert.py"
            raise DataError(f"only pickled weights: {', '.join(pickles)}", where=str(directory), hint=hint)
        raise DataError(f"there is no {WEIGHTS}", where=str(directory), hint="give the directory of a saved model")
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise DataError("`weight_map` must map parameter names to file names", where=str(index))
    for name in sorted(set(shards.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise DataError(f"{name!r} is not a safetensors file of this directory", where=str(index))
        if not (directory / name).is_file():
            raise DataError(f"the file {name!r} is missing", where=str(index), hint="copy the model again")
    return [directory / name for name in sorted(set(shards.values()))]


def _screen_weights(path: Path) -> None:
    """Raises DataError if a safetensors file is cut off or not one: its header must account for every byte."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        what = f"not a whole safetensors file ({path.stat().st_size} bytes): {error}"
        raise DataError(what, where=str(path), hint="copy the model again") from error
