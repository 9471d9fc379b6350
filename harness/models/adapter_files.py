"""An adapter's directory: adapter_model.safetensors and adapter_config.json as plain PEFT reads them, and base.json:
the hash of the weights that the adapter belongs to, and the types they were read in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from harness.errors import ConfigError, DataError
from harness.io.atomic import read_json, write_json
from harness.models.adapters import ADAPTER_NAME, without_virtual_positions
from harness.models.bottleneck import BOTTLENECK_TYPE, add_bottlenecks, bottleneck_tensors
from harness.models.load import base_fingerprint
from harness.models.quantization import dequantize, is_quantized
from harness.models.screen import ADAPTER_BASE

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MERGEABLE = ("LORA", "ADALORA", "IA3")
PROMPT_TYPES = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def save_adapter(model: Any, directory: Path, *, base: str | Path, read_as: dict[str, Any] | None = None) -> None:
    """Writes the adapter in `model`, of which `base` is the base's directory or hub name.

    `read_as`: `dtype` and `quantization` of the run file's `model`, for those who read the base again.
    The factors of PiSSA become a LoRA of twice the rank: the difference from where they started, so that it fits the
    base as it is. Bottlenecks are ours: PEFT does not know them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "bottleneck_config"):
        tensors: dict[str, Tensor] = dict(bottleneck_tensors(model))
        write_json(directory / CONFIG, model.bottleneck_config | {"base_model_name_or_path": str(base)})
    else:
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
        if hasattr(model, "initial_factors"):
            tensors |= _differences(tensors, model.initial_factors)
            config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, 2 * config.lora_alpha
        config.inference_mode, config.base_model_name_or_path = True, str(base)
        config.save_pretrained(directory)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, directory / WEIGHTS)
    known = {"name": str(base), "weights_sha256": base_fingerprint(base)}
    write_json(directory / ADAPTER_BASE, known | (read_as or {}))


def load_adapter(base_model: PreTrainedModel, directory: Path, *, trainable: bool = False) -> Any:
    """The adapter of `directory` on its base; `base_model` becomes part of what is returned.

    Raises DataError if files are damaged or the base is another one. An adapter that others have written does not say
    which weights it belongs to. Raises ConfigError if virtual tokens are to be trained further: PEFT cannot.
    """
    config = read_json(directory / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != BOTTLENECK_TYPE and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise DataError(f"an adapter of an unknown kind: {kind!r}", where=str(directory / CONFIG))
    if trainable and kind in PROMPT_TYPES:
        raise ConfigError(f"{kind} cannot be trained further", hint="resume from a checkpoint, or train a new adapter")
    if not (directory / WEIGHTS).is_file():  # PEFT would look for a pickle, and then on the hub
        raise DataError(f"there is no {WEIGHTS}", where=str(directory))
    _check_base(base_model, directory)
    base_model.requires_grad_(False)
    try:
        if kind == BOTTLENECK_TYPE:
            return _load_bottlenecks(base_model, directory, config, trainable)
        options = {"is_trainable": trainable, "torch_device": str(base_model.device)}
        adapted = PeftModel.from_pretrained(base_model, directory, **options)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the adapter cannot be read: {error}", where=str(directory)) from error
    return without_virtual_positions(adapted)


def mergeable(model: Any) -> Any:
    """PEFT's settings of the adapter in `model`. Raises ConfigError if it changes more than weights."""
    config = getattr(model, "peft_config", {}).get(ADAPTER_NAME)
    if config is None or config.peft_type not in MERGEABLE:
        method = "bottleneck" if config is None else config.peft_type.lower()
        raise ConfigError(f"{method} cannot be merged into weights", hint="export the adapter beside its base")
    return config


def merge_adapter(model: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base with the adapter added into its weights; a quantised base is made plain, in `dtype`, before.

    `model` is used up. Raises ConfigError as `mergeable` does.
    """
    config = mergeable(model)
    if is_quantized(model):  # PEFT would round the sum to 4 bits again
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        model = get_peft_model(dequantize(_without_adapter(model), dtype), config)
        set_peft_model_state_dict(model, tensors)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
    return _without_adapter(model)


def _without_adapter(model: Any) -> PreTrainedModel:
    """The base model, with the modules that were trained whole. PEFT's `unload` refuses IA3 on a quantised base."""
    base: PreTrainedModel = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[ADAPTER_NAME])
    del base.peft_config
    return base


def _differences(tensors: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A - B0 A0 as one product: [B, -B0] [A; A0]."""
    found = {}
    for name, start in initial.items():
        key = name.replace(f".{ADAPTER_NAME}.", ".")
        is_a = ".lora_A." in key
        found[key] = torch.cat([tensors[key], start if is_a else -start], dim=0 if is_a else 1)
    return found


def _load_bottlenecks(model: PreTrainedModel, directory: Path, config: dict[str, Any], trainable: bool) -> Any:
    add_bottlenecks(model, size=config["size"], dropout=config["dropout"], saved=config["saved"])
    ours, theirs = bottleneck_tensors(model), load_file(directory / WEIGHTS)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{len(ours.keys() ^ theirs.keys())} parameters are not in both adapter and model")
    model.load_state_dict(theirs, strict=False)
    for parameter in ours.values():
        parameter.requires_grad_(trainable)
    return model


def _check_base(base_model: PreTrainedModel, directory: Path) -> None:
    if not (directory / ADAPTER_BASE).is_file():
        return
    base = read_json(directory / ADAPTER_BASE)
    if base_fingerprint(base_model.name_or_path) != base["weights_sha256"]:
        what = f"the adapter belongs to other weights than those of {base_model.name_or_path}"
        raise DataError(what, where=str(directory), hint=f"it was trained on {base['name']}")
