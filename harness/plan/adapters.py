"""Tensors that an adapter adds, by arithmetic: what ``models.adapters`` makes trainable. A test compares the two."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from harness.config.schema import AdapterConfig, Task
from harness.plan.layers import layer_places
from harness.plan.tensors import ModelJson, Tensor, Tensors, linear, norm, stack, under

# As in models.adapters: keys, values and the feed-forward layer's second matrix (Liu et al. 2022, section 3.3).
IA3_FEEDFORWARD = re.compile(r"(.*\.)?(fc2|down_proj|wo|lin2|dense_4h_to_h|mlp\.c_proj|layer\.\d+\.output\.dense)")
IA3_KEYS_VALUES = re.compile(r"(.*\.)?(k_proj|v_proj|k|v|key|value|k_lin|v_lin|c_attn|query_key_value|qkv_proj)")


def adapter_tensors(adapter: AdapterConfig, task: Task, model: ModelJson, tensors: Tensors) -> Tensors:
    """What is trained with an adapter: its own tensors, and modules that are trained whole."""
    saved = {
        name: tensor
        for name, tensor in tensors.items()
        if _is_named(name.rpartition(".")[0], adapter.modules_to_save)
        or (tensor.kind == "head" and task == "classification")
    }
    if "lm_head" in adapter.modules_to_save and "lm_head.weight" not in tensors:  # the token table under another name
        tables = [tensor for tensor in tensors.values() if tensor.kind == "embedding"]
        saved["lm_head.weight"] = max(tables, key=lambda tensor: tensor.size)
    return under("saved", saved) | _METHODS[adapter.method](adapter, model, tensors)


def _targets(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Iterator[tuple[str, int, int]]:
    """(module, outputs, inputs) of every layer that gets an adapter."""
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name == module or len(tensor.shape) != 2:
            continue
        if adapter.targets == "auto":
            chosen = tensor.kind == "linear"
        elif isinstance(adapter.targets, str):
            chosen = re.fullmatch(adapter.targets, module) is not None
        else:
            chosen = _is_named(module, adapter.targets)
        if chosen:
            outputs, inputs = reversed(tensor.shape) if model["model_type"] == "gpt2" else tensor.shape
            yield module, outputs, inputs


def _is_named(module: str, names: list[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def _low_rank(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Tensors:
    added: Tensors = {}
    for module, outputs, inputs in _targets(adapter, model, tensors):
        added |= {
            f"{module}.lora_A": Tensor((adapter.rank, inputs), "linear"),
            f"{module}.lora_B": Tensor((outputs, adapter.rank), "linear"),
        }
        if adapter.method == "dora":
            added[f"{module}.magnitude"] = Tensor((outputs,))
    return added


def _adalora(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Tensors:
    """It starts at 1.5 times the rank it is to end with, and has a singular value for each."""
    rank = adapter.rank * 3 // 2
    added = _low_rank(adapter.model_copy(update={"rank": rank}), model, tensors)
    return added | {f"{module}.lora_E": Tensor((rank, 1)) for module, *_ in _targets(adapter, model, tensors)}


def _ia3(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Tensors:
    added: Tensors = {}
    for module, outputs, inputs in _targets(adapter, model, tensors):
        is_feedforward = IA3_FEEDFORWARD.fullmatch(module) is not None
        if is_feedforward or adapter.targets != "auto" or IA3_KEYS_VALUES.fullmatch(module):
            added[f"{module}.ia3_l"] = Tensor((1, inputs) if is_feedforward else (outputs, 1))
    return added


def _prefix(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Tensors:
    """A key and a value for each virtual token, layer and key-value head; of the decoder where there are two sides."""
    heads = model.get("num_heads") or model.get("decoder_attention_heads") or _num_heads(model)
    head_dim = model.get("d_kv") or model.get("head_dim") or _width(model) // heads
    values = head_dim * (model.get("num_key_value_heads") or heads)
    places = set(layer_places(tensors).values())
    num_layers = sum(place.stack != "encoder" for place in places)
    return {"prefix": Tensor((adapter.num_virtual_tokens, num_layers * 2 * values))}


def _prompt(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Tensors:
    width = _width(model)
    prompt = {"prompt": Tensor((adapter.num_virtual_tokens, width), "embedding")}
    if adapter.method == "prompt_tuning":
        return prompt
    return prompt | linear("mlp.0", width, width) | linear("mlp.2", width, width) | linear("mlp.4", width, width)


def _bottleneck(adapter: AdapterConfig, model: ModelJson, tensors: Tensors) -> Tensors:
    width, size = _width(model), adapter.bottleneck_size
    layer = norm("norm", width) | linear("down", size, width) | linear("up", width, size)
    return stack("bottleneck", len(set(layer_places(tensors).values())), layer)


def _width(model: ModelJson) -> int:
    return int(next(model[name] for name in ("hidden_size", "d_model", "n_embd", "dim") if name in model))


def _num_heads(model: ModelJson) -> int:
    return int(next(model[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in model))


_METHODS: dict[str, Callable[[AdapterConfig, ModelJson, Tensors], Tensors]] = {
    "lora": _low_rank,
    "rslora": _low_rank,
    "dora": _low_rank,
    "pissa": _low_rank,
    "adalora": _adalora,
    "ia3": _ia3,
    "prefix_tuning": _prefix,
    "prompt_tuning": _prompt,
    "p_tuning": _prompt,
    "bottleneck": _bottleneck,
}
