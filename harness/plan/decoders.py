"""Tensors of the decoder-only families, as language models and as classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.plan.tensors import ModelJson, Tensor, Tensors, head, linear, norm, stack, table, under


@dataclass(frozen=True)
class Decoder:
    """``body``: the tensors below ``prefix``. ``tied``: the output layer is the token table unless config.json says
    otherwise."""

    prefix: str
    body: Callable[[ModelJson], Tensors]
    tied: bool

    def language_model(self, model: ModelJson) -> Tensors:
        tensors = under(self.prefix, self.body(model))
        if model.get("tie_word_embeddings", self.tied):
            return tensors
        return tensors | head(table("lm_head", model["vocab_size"], _output_width(model)))

    def classifier(self, model: ModelJson, num_labels: int) -> Tensors:
        tensors = under(self.prefix, self.body(model))
        return tensors | head(linear("score", num_labels, _output_width(model), bias=False))


@dataclass(frozen=True)
class _Llama:
    """Rotary positions, RMSNorm, a gated feed-forward (Touvron et al. 2023), and what its relatives do otherwise.

    ``attention_bias``: of q, k, v and o, or only of the first three; None: config.json says.
    """

    attention_bias: bool | None = None
    output_bias: bool = True
    head_norms: bool = False
    four_norms: bool = False
    head_dim: int | None = None
    key_value_heads: int | None = None

    def __call__(self, model: ModelJson) -> Tensors:
        width, hidden, num_heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
        head_dim = model.get("head_dim") or self.head_dim or width // num_heads
        values = (model.get("num_key_value_heads") or self.key_value_heads or num_heads) * head_dim
        bias = model.get("attention_bias", False) if self.attention_bias is None else self.attention_bias
        layer = linear("self_attn.q_proj", num_heads * head_dim, width, bias=bias)
        layer |= linear("self_attn.k_proj", values, width, bias=bias)
        layer |= linear("self_attn.v_proj", values, width, bias=bias)
        layer |= linear("self_attn.o_proj", width, num_heads * head_dim, bias=bias and self.output_bias)
        for name, outputs, inputs in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)):
            layer |= linear(f"mlp.{name}_proj", outputs, inputs, bias=model.get("mlp_bias", False))
        if self.head_norms:
            layer |= norm("self_attn.q_norm", head_dim, bias=False) | norm("self_attn.k_norm", head_dim, bias=False)
        return _with_rms_norms(model, layer, _FOUR_NORMS if self.four_norms else _TWO_NORMS)


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _with_rms_norms(model: ModelJson, layer: Tensors, norms: tuple[str, ...]) -> Tensors:
    width = model["hidden_size"]
    for name in norms:
        layer = layer | norm(name, width, bias=False)
    layers = stack("layers", model["num_hidden_layers"], layer)
    return table("embed_tokens", model["vocab_size"], width) | layers | norm("norm", width, bias=False)


def _phi3(model: ModelJson) -> Tensors:
    """Llama with q, k, v in one matrix and gate, up in another."""
    width, hidden, num_heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    head_dim = model.get("head_dim") or width // num_heads
    values = (model.get("num_key_value_heads") or num_heads) * head_dim
    layer = linear("self_attn.qkv_proj", num_heads * head_dim + 2 * values, width, bias=False)
    layer |= linear("self_attn.o_proj", width, num_heads * head_dim, bias=False)
    layer |= linear("mlp.gate_up_proj", 2 * hidden, width, bias=False)
    layer |= linear("mlp.down_proj", width, hidden, bias=False)
    return _with_rms_norms(model, layer, _TWO_NORMS)


def _gpt2(model: ModelJson) -> Tensors:
    """Its linear layers are stored the other way round: (inputs, outputs)."""
    width = model["n_embd"]
    hidden = model.get("n_inner") or 4 * width
    sizes = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": hidden, "mlp.c_proj": width}
    layer = norm("ln_1", width) | norm("ln_2", width)
    for name, outputs in sizes.items():
        inputs = hidden if name == "mlp.c_proj" else width
        layer |= {f"{name}.weight": Tensor((inputs, outputs), "linear"), f"{name}.bias": Tensor((outputs,))}
    tables = table("wte", model["vocab_size"], width) | table("wpe", model["n_positions"], width)
    return tables | stack("h", model["n_layer"], layer) | norm("ln_f", width)


def _opt(model: ModelJson) -> Tensors:
    width, hidden, bias = model["hidden_size"], model["ffn_dim"], model.get("enable_bias", True)
    affine = model.get("layer_norm_elementwise_affine", True)
    norms = norm("self_attn_layer_norm", width) | norm("final_layer_norm", width) if affine else {}
    layer = norms | linear("fc1", hidden, width, bias=bias) | linear("fc2", width, hidden, bias=bias)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= linear(f"self_attn.{part}", width, width, bias=bias)
    inner = _output_width(model)
    tensors = table("embed_tokens", model["vocab_size"], inner) | stack("layers", model["num_hidden_layers"], layer)
    tensors |= table("embed_positions", model["max_position_embeddings"] + 2, width)
    if inner != width:
        tensors |= linear("project_in", width, inner, bias=False) | linear("project_out", inner, width, bias=False)
    before = model.get("do_layer_norm_before", True) and not model.get("_remove_final_layer_norm", False)
    return tensors | norm("final_layer_norm", width) if before and affine else tensors


def _gpt_neox(model: ModelJson) -> Tensors:
    width, hidden, bias = model["hidden_size"], model["intermediate_size"], model.get("attention_bias", True)
    layer = norm("input_layernorm", width) | norm("post_attention_layernorm", width)
    layer |= linear("attention.query_key_value", 3 * width, width, bias=bias)
    layer |= linear("attention.dense", width, width, bias=bias)
    layer |= linear("mlp.dense_h_to_4h", hidden, width) | linear("mlp.dense_4h_to_h", width, hidden)
    layers = stack("layers", model["num_hidden_layers"], layer)
    return table("embed_in", model["vocab_size"], width) | layers | norm("final_layer_norm", width)


def _output_width(model: ModelJson) -> int:
    return int(model.get("word_embed_proj_dim") or model.get("hidden_size") or model["n_embd"])


DECODERS: dict[str, Decoder] = {
    "llama": Decoder("model", _Llama(), tied=False),
    "mistral": Decoder("model", _Llama(attention_bias=False, key_value_heads=8), tied=False),
    "qwen2": Decoder("model", _Llama(attention_bias=True, output_bias=False), tied=False),
    "qwen3": Decoder("model", _Llama(head_norms=True, head_dim=128), tied=False),
    "smollm3": Decoder("model", _Llama(key_value_heads=4), tied=True),
    "gemma": Decoder("model", _Llama(head_dim=256), tied=True),
    "gemma2": Decoder("model", _Llama(head_dim=256, four_norms=True), tied=True),
    "gemma3_text": Decoder("model", _Llama(head_dim=256, four_norms=True, head_norms=True), tied=True),
    "phi3": Decoder("model", _phi3, tied=False),
    "gpt2": Decoder("transformer", _gpt2, tied=True),
    "opt": Decoder("model.decoder", _opt, tied=True),
    "gpt_neox": Decoder("gpt_neox", _gpt_neox, tied=False),
}
