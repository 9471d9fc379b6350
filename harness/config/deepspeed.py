"""The DeepSpeed file of a run: a preset or the user's own JSON, with the run file's overrides merged over it.

One rule for presets, files and overrides alike: a key that the run file decides (``deepspeed_keys.OWNED``) may stand
there only as ``"auto"`` or with the value the run file gives it; otherwise it is an error, never a silent choice.
``"auto"`` anywhere else means DeepSpeed's default. ``null`` in the overrides removes a key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from harness.config import deepspeed_keys as keys
from harness.config.nearest import did_you_mean
from harness.config.schema import DeepSpeedConfig, RunConfig
from harness.errors import ConfigError

Problem = tuple[str, str]
OffloadDevice = Literal["none", "cpu", "nvme"]

PRESET_DIRECTORY = Path(__file__).resolve().parents[2] / "ds_configs"


def preset_names() -> list[str]:
    """Names of the presets in ds_configs/."""
    return sorted(path.stem for path in PRESET_DIRECTORY.glob("*.json"))


def merged_document(deepspeed: DeepSpeedConfig) -> dict[str, Any]:
    """The preset or file, the overrides over it, ``nvme_path`` put in and every ``"auto"`` left out.

    Raises ConfigError if the file cannot be found or read.
    """
    document = _without_auto(_merge(_read(deepspeed.preset), deepspeed.overrides))
    if deepspeed.nvme_path is not None:
        for section in _offload_sections(document):
            if section.get("device") == "nvme":
                section["nvme_path"] = deepspeed.nvme_path
    return document


def owned_values(config: RunConfig) -> dict[str, Any]:
    """What the run file says for the DeepSpeed keys it owns. Micro-batches and accumulation are the loop's: 1 and 1."""
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "managed_gradient_accumulation": False,
    }
    if config.model.dtype == "bfloat16":
        values["bf16"] = {"enabled": True}
    if config.model.dtype == "float16":
        values["fp16"] = {"enabled": True, "loss_scale": 0}
    return values


def zero_stage(document: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 if it has none."""
    return int(_zero(document).get("stage", 0))


def offload_device(document: dict[str, Any], what: Literal["optimizer", "param"]) -> OffloadDevice:
    """Where a DeepSpeed configuration keeps optimizer states or parameters while they are not in use."""
    section = _zero(document).get(f"offload_{what}") or {}
    device: OffloadDevice = section.get("device", "none")
    return device


def document_problems(config: RunConfig) -> list[Problem]:
    """Every wrong or contradictory key of the run's DeepSpeed file and overrides, as (run file key, message)."""
    try:
        document = merged_document(config.deepspeed)
    except ConfigError as error:
        return [("deepspeed.preset", f"{error.what}: {error.hint}" if error.hint else error.what)]
    shape = list(_shape_problems(document))
    if shape:
        return _placed(config, shape)
    problems = [*_top_level_problems(document, owned_values(config)), *_zero_problems(document)]
    return _placed(config, problems)


def _read(preset: str) -> dict[str, Any]:
    is_file = "/" in preset or preset.endswith(".json")
    path = Path(preset) if is_file else PRESET_DIRECTORY / f"{preset}.json"
    if not is_file and not path.is_file():
        names = preset_names()
        raise ConfigError(f"no preset `{preset}`{did_you_mean(preset, names)}", hint=f"presets: {', '.join(names)}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    if not is_file:  # a preset's path only shows where one belongs
        for section in _offload_sections(document):
            section.pop("nvme_path", None)
    return document


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _without_auto(document: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in document.items():
        if value == "auto" or (isinstance(value, dict) and value.get("enabled") == "auto"):
            continue
        kept[key] = _without_auto(value) if isinstance(value, dict) else value
    return kept


def _zero(document: dict[str, Any]) -> dict[str, Any]:
    zero = document.get("zero_optimization")
    return zero if isinstance(zero, dict) else {}


def _offload_sections(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in keys.OFFLOAD:
        section = _zero(document).get(name)
        if isinstance(section, dict):
            yield section


def _shape_problems(document: dict[str, Any]) -> Iterator[Problem]:
    zero = document.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield "zero_optimization", f"must be an object, got {zero!r}"
        return
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        yield "zero_optimization.stage", f"must be 0, 1, 2 or 3, got {stage!r}"
    for name in keys.OFFLOAD:
        section = zero.get(name, {})
        if not isinstance(section, dict):
            yield f"zero_optimization.{name}", f'must be an object like {{"device": "cpu"}}, got {section!r}'
        elif section.get("device", "none") not in ("none", "cpu", "nvme"):
            yield f"zero_optimization.{name}.device", f"must be none, cpu or nvme, got {section['device']!r}"


def _top_level_problems(document: dict[str, Any], owned: dict[str, Any]) -> Iterator[Problem]:
    for key, value in document.items():
        if key in keys.OWNED:
            if not _agrees(key, value, owned):
                yield key, f"belongs to the run file: {keys.OWNED[key]}, and remove it here"
        elif key in keys.REMOVED:
            yield key, "was removed from DeepSpeed: remove it"
        elif key in keys.UNSUPPORTED:
            yield key, f"{keys.UNSUPPORTED[key]}: remove it"
        elif key not in keys.SUPPORTED:
            yield key, f"is not a key of DeepSpeed{did_you_mean(key, [*keys.SUPPORTED, *keys.OWNED])}"


def _agrees(key: str, value: Any, owned: dict[str, Any]) -> bool:
    if key in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        enabled = value.get("enabled", False) if isinstance(value, dict) else value
        switched_on = "bf16" if key == "bfloat16" else key
        return bool(enabled is (switched_on in owned)) and (not isinstance(value, dict) or set(value) <= {"enabled"})
    return key in owned and value == owned[key] and isinstance(value, bool) == isinstance(owned[key], bool)


def _zero_problems(document: dict[str, Any]) -> Iterator[Problem]:
    zero = _zero(document)
    for key in zero:
        where = f"zero_optimization.{key}"
        if key in keys.REMOVED_ZERO:
            yield where, "was removed from DeepSpeed: remove it"
        elif key in keys.UNSUPPORTED_ZERO:
            yield where, keys.UNSUPPORTED_ZERO[key]
        elif key not in keys.ZERO:
            yield where, f"is not a key of zero_optimization{did_you_mean(key, keys.ZERO)}"
    yield from _offload_problems(document)
    yield from _nvme_problems(document)


def _offload_problems(document: dict[str, Any]) -> Iterator[Problem]:
    stage = zero_stage(document)
    for name, known in keys.OFFLOAD.items():
        where, section = f"zero_optimization.{name}", _zero(document).get(name, {})
        for key in section:
            if key not in known:
                yield f"{where}.{key}", f"is not a supported key of {name}{did_you_mean(key, known)}"
        device = section.get("device", "none")
        if device == "nvme" and stage != 3:
            yield where, f"NVMe offload works at ZeRO stage 3 only, and this is stage {stage}: choose zero3_nvme or cpu"
        elif name == "offload_param" and device != "none" and stage != 3:
            yield where, f"parameter offload needs ZeRO stage 3, and this is stage {stage}: choose zero3_offload"
        elif device != "none" and stage == 0:
            yield where, "optimizer offload needs ZeRO stage 1, 2 or 3, and this is stage 0: choose zero2_offload"


def _nvme_problems(document: dict[str, Any]) -> Iterator[Problem]:
    on_nvme = [section for section in _offload_sections(document) if section.get("device") == "nvme"]
    if zero_stage(document) == 3 and not all(section.get("nvme_path") for section in on_nvme):
        yield "zero_optimization", "NVMe offload needs a directory on a local disk: set `deepspeed.nvme_path`"


def _placed(config: RunConfig, problems: list[Problem]) -> list[Problem]:
    """Blame the override if the key came from there, else the preset or file."""
    return [
        (f"deepspeed.overrides.{key}", message)
        if _contains(config.deepspeed.overrides, key.split("."))
        else ("deepspeed.preset", f"{config.deepspeed.preset}: {key}: {message}")
        for key, message in problems
    ]


def _contains(overrides: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(overrides, dict) or key not in overrides:
            return False
        overrides = overrides[key]
    return True
