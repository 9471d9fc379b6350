"""Adapters: small trained parts beside a frozen base, most of them PEFT's.

The logits have the positions of the input with every method. In plain PEFT a decoder-only model under prompt_tuning or
p_tuning gives `num_virtual_tokens` more, in front; `without_virtual_positions` cuts them off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.config.nearest import did_you_mean
from harness.config.schema import AdapterConfig, Task
from harness.errors import ConfigError
from harness.models.bottleneck import add_bottlenecks
from harness.models.linear import head_modules, linear_layers

TASK_TYPES: dict[Task, TaskType] = {
    "translation": TaskType.SEQ_2_SEQ_LM,
    "causal_lm": TaskType.CAUSAL_LM,
    "classification": TaskType.SEQ_CLS,
}
# IA3 scales keys, values and what enters the second matrix of the feed-forward layer (Liu et al. 2022, section 3.3).
IA3_KEYS_VALUES = re.compile(r"(.*\.)?(k_proj|v_proj|k|v|key|value|k_lin|v_lin|c_attn|query_key_value|qkv_proj)")
IA3_FEEDFORWARD = re.compile(r"(.*\.)?(fc2|down_proj|wo|lin2|dense_4h_to_h|mlp\.c_proj|layer\.\d+\.output\.dense)")
# A quick and close SVD instead of minutes for each matrix of a large model (Meng et al. 2024, section 5.5).
PISSA_INIT = "pissa_niter_16"

LORA_METHODS = ("lora", "rslora", "dora", "pissa")
ADAPTER_NAME = "default"  # PEFT's

Options = dict[str, Any]


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, task: Task, total_steps: int, seed: int) -> nn.Module:
    """Freezes `model` and puts the adapter into it; what is returned takes its place.

    The new weights are float32 and follow from `seed` and the base alone. Heads of classifiers are trained whole.
    Raises ConfigError if `targets` or `modules_to_save` match nothing, or the method does not work with the model.
    """
    saved = saved_modules(model, config.modules_to_save, task)
    shares_weights = _is_tied(model, config)
    _check_virtual_tokens(model, config.method, task)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.method == "bottleneck":
            adapted: Any = add_bottlenecks(model, size=config.bottleneck_size, dropout=config.dropout, saved=saved)
        else:
            options: Options = {"task_type": TASK_TYPES[task], "modules_to_save": saved or None}
            options |= {"ensure_weight_tying": True} if shares_weights else {}
            adapted = get_peft_model(model, METHODS[config.method](model, config, options, total_steps))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.method == "pissa":
        adapted.initial_factors = {
            name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name
        }
    return without_virtual_positions(adapted)


def without_virtual_positions(adapted: nn.Module) -> nn.Module:
    """Cuts the logits of virtual tokens off, so that logits have the positions of the input whatever the method."""
    config = getattr(adapted, "peft_config", {}).get(ADAPTER_NAME)
    if isinstance(config, PromptTuningConfig | PromptEncoderConfig) and config.task_type == TaskType.CAUSAL_LM:
        adapted.register_forward_hook(_cut_virtual_positions)
    return adapted


def _cut_virtual_positions(adapted: Any, inputs: Any, output: Any) -> Any:
    output.logits = output.logits[:, adapted.peft_config[ADAPTER_NAME].num_virtual_tokens :]
    return output


def saved_modules(model: PreTrainedModel, names: list[str], task: Task) -> list[str]:
    """Modules that are trained and saved whole: `names`, and for classification the heads. Raises ConfigError."""
    _matching(model, names, "adapter.modules_to_save")
    return sorted({*names, *(head_modules(model) if task == "classification" else ())})


def _is_tied(model: PreTrainedModel, config: AdapterConfig) -> bool:
    """Whether a module of `modules_to_save` shares its weight. Raises ConfigError where each would train its own copy.

    PEFT keeps the weight one for LoRA on decoder-only models.
    """
    shared = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
    tied = sorted(shared.intersection(_matching(model, config.modules_to_save, "adapter.modules_to_save")))
    if tied and (config.method not in LORA_METHODS or model.config.is_encoder_decoder):
        what = f"{tied[0]} shares its weight with {', '.join(sorted(shared - {tied[0]}))}"
        hint = "leave it out: with this method and model it would be trained as a weight of its own"
        raise ConfigError(what, where="adapter.modules_to_save", hint=hint)
    return bool(tied)


def _check_virtual_tokens(model: PreTrainedModel, method: str, task: Task) -> None:
    """Raises ConfigError where PEFT's virtual tokens would be wrong in silence, or fail in the first step.

    Some classifiers look for their last token in the input ids; Marian scales embeddings only if it looks them up.
    """
    if method not in ("prefix_tuning", "prompt_tuning", "p_tuning"):
        return
    finds_last_token = "score" in head_modules(model) and method != "prefix_tuning"
    scales_outside = (
        getattr(model.config, "scale_embedding", False) and type(model.get_input_embeddings()) is nn.Embedding
    )
    wrong = task == "classification" and (model.config.is_encoder_decoder or finds_last_token)
    if wrong or (scales_outside and method != "prefix_tuning"):
        what = f"{type(model).__name__} cannot have virtual tokens in front of its input"
        raise ConfigError(what, where="adapter.method", hint="use lora")


def target_modules(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Names of the layers that get an adapter. Raises ConfigError if a pattern or name matches none."""
    if targets == "auto":
        return list(linear_layers(model))
    if isinstance(targets, list):
        return _matching(model, targets, "adapter.targets")
    try:
        found = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    except re.error as error:
        raise ConfigError(f"not a regular expression: {error}", where="adapter.targets") from error
    if not found:
        what = f"no module's whole name matches {targets!r}{did_you_mean(targets, _last_parts(model))}"
        raise ConfigError(
            what, where="adapter.targets", hint=f"a name of this model: {next(iter(linear_layers(model)))}"
        )
    return found


def _matching(model: PreTrainedModel, wanted: Iterable[str], where: str) -> list[str]:
    """Modules whose name is one of `wanted` or ends in it. Raises ConfigError if one of `wanted` matches none."""
    found = []
    for suffix in wanted:
        matched = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{suffix}")]
        if not matched:
            what = f"the model has no module {suffix!r}{did_you_mean(suffix, _last_parts(model))}"
            raise ConfigError(what, where=where, hint=f"linear layers: {', '.join(_last_parts(model))}")
        found += matched
    return found


def _last_parts(model: PreTrainedModel) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in [*linear_layers(model), *head_modules(model)]})


def _shortest(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The last parts of `names` where they name exactly these modules, as PEFT matches them; else `names`."""
    parts = {name.rpartition(".")[2] for name in names}
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in parts}
    return sorted(parts if alike == set(names) else names)


def _targets(model: PreTrainedModel, config: AdapterConfig) -> Options:
    names = target_modules(model, config.targets)
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    return {"target_modules": _shortest(model, names), "fan_in_fan_out": transposed}


def _lora(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int, **more: Any) -> PeftConfig:
    options = options | {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    return LoraConfig(**options, **_targets(model, config), **more)


def _rslora(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    return _lora(model, config, options, total_steps, use_rslora=True)


def _dora(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    return _lora(model, config, options, total_steps, use_dora=True)


def _pissa(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    has_weights = model.device.type != "meta"
    return _lora(model, config, options, total_steps, init_lora_weights=PISSA_INIT if has_weights else True)


def _adalora(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    """Starts at 1.5 times the final rank and comes down between a tenth and seven tenths of the run."""
    ranks = {"init_r": config.rank * 3 // 2, "target_r": config.rank, "total_step": total_steps}
    phases = {"tinit": total_steps // 10, "tfinal": total_steps * 3 // 10, "deltaT": max(1, total_steps // 100)}
    options = options | {"lora_alpha": config.alpha, "lora_dropout": config.dropout}
    return AdaLoraConfig(**options, **ranks, **phases, **_targets(model, config))


def _ia3(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    names = target_modules(model, config.targets)
    if config.targets == "auto":
        names = [name for name in names if IA3_KEYS_VALUES.fullmatch(name) or IA3_FEEDFORWARD.fullmatch(name)]
    feedforward = [name for name in names if IA3_FEEDFORWARD.fullmatch(name)]
    if config.targets == "auto" and not feedforward:
        what = f"the keys, values and feed-forward layers of {model.config.model_type} are not known"
        raise ConfigError(what, where="adapter.method", hint="name them in adapter.targets")
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    return IA3Config(**options, target_modules=names, feedforward_modules=feedforward, fan_in_fan_out=transposed)


def _prefix_tuning(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    """Keys and values in front of those of every decoder layer; PEFT would count and measure an encoder's."""
    shape, sizes = {}, model.config
    if sizes.is_encoder_decoder:
        heads_name = "num_heads" if hasattr(sizes, "num_heads") else "decoder_attention_heads"
        layers_name = "num_decoder_layers" if hasattr(sizes, "num_decoder_layers") else "decoder_layers"
        num_heads = getattr(sizes, heads_name)
        width = num_heads * getattr(sizes, "d_kv", sizes.hidden_size // num_heads)
        shape = {"num_layers": getattr(sizes, layers_name), "num_attention_heads": num_heads, "token_dim": width}
    return PrefixTuningConfig(**options, num_virtual_tokens=config.num_virtual_tokens, **shape)


def _prompt_tuning(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    """Starts from random embeddings of the vocabulary (Lester et al. 2021, section 3.2)."""
    options = options | {"num_virtual_tokens": config.num_virtual_tokens, "num_transformer_submodules": 1}
    return PromptTuningConfig(**options, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)


def _p_tuning(model: PreTrainedModel, config: AdapterConfig, options: Options, total_steps: int) -> PeftConfig:
    options = options | {"num_virtual_tokens": config.num_virtual_tokens, "num_transformer_submodules": 1}
    return PromptEncoderConfig(**options, encoder_dropout=config.dropout)


METHODS: dict[str, Callable[[PreTrainedModel, AdapterConfig, Options, int], PeftConfig]] = {
    "lora": _lora,
    "rslora": _rslora,
    "dora": _dora,
    "pissa": _pissa,
    "adalora": _adalora,
    "ia3": _ia3,
    "prefix_tuning": _prefix_tuning,
    "prompt_tuning": _prompt_tuning,
    "p_tuning": _p_tuning,
}
