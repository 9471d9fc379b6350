"""Tensors of the encoder-decoder families. Marian's sinusoidal positions are fixed and not counted."""

from __future__ import annotations

from harness.plan.tensors import ModelJson, Tensor, Tensors, head, linear, norm, stack, table, under


def mbart(model: ModelJson) -> Tensors:
    return _bart(model, learned_positions=True, embedding_norm=True, final_norm=True) | _tables(model)


def m2m_100(model: ModelJson) -> Tensors:
    return _bart(model, learned_positions=False, embedding_norm=False, final_norm=True) | _tables(model)


def marian(model: ModelJson) -> Tensors:
    body = _bart(model, learned_positions=False, embedding_norm=False, final_norm=False)
    if model.get("share_encoder_decoder_embeddings", True):
        return body | _tables(model)
    width, target = model["d_model"], model.get("decoder_vocab_size") or model["vocab_size"]
    body |= table("model.encoder.embed_tokens", model["vocab_size"], width)
    body |= table("model.decoder.embed_tokens", target, width)
    return body if model.get("tie_word_embeddings", True) else body | head(table("lm_head", target, width))


def mbart_classifier(model: ModelJson, num_labels: int) -> Tensors:
    body = {name: tensor for name, tensor in mbart(model).items() if not name.startswith("lm_head.")}
    return body | _classifier(model["d_model"], num_labels)


def t5(model: ModelJson) -> Tensors:
    """T5 and mT5: no biases, RMSNorm, relative positions in the first layer of each side, tied output."""
    width, hidden = model["d_model"], model["d_ff"]
    inner = model["d_kv"] * model["num_heads"]
    gated = model.get("feed_forward_proj", _T5_FEED_FORWARD[model["model_type"]]).startswith("gated-")
    forward: Tensors = {}
    for name in ("wi_0", "wi_1") if gated else ("wi",):
        forward |= linear(f"DenseReluDense.{name}", hidden, width, bias=False)
    forward |= linear("DenseReluDense.wo", width, hidden, bias=False)
    positions = Tensor((model.get("relative_attention_num_buckets", 32), model["num_heads"]))
    tensors = table("shared", model["vocab_size"], width)
    num_layers = model["num_layers"]
    sides = (
        ("encoder", ("SelfAttention",), num_layers),
        ("decoder", ("SelfAttention", "EncDecAttention"), model.get("num_decoder_layers") or num_layers),
    )
    for side, attentions, count in sides:
        parts = [_t5_attention(name, inner, width) for name in attentions]
        layer: Tensors = {}
        for index, part in enumerate([*parts, forward]):
            layer |= under(f"layer.{index}", part | norm("layer_norm", width, bias=False))
        tensors |= stack(f"{side}.block", count, layer) | norm(f"{side}.final_layer_norm", width, bias=False)
        tensors[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = positions
    return tensors


def t5_classifier(model: ModelJson, num_labels: int) -> Tensors:
    return under("transformer", t5(model)) | _classifier(model["d_model"], num_labels)


_T5_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}


def _t5_attention(name: str, inner: int, width: int) -> Tensors:
    tensors = linear(f"{name}.o", width, inner, bias=False)
    for part in "qkv":
        tensors |= linear(f"{name}.{part}", inner, width, bias=False)
    return tensors


def _bart(model: ModelJson, *, learned_positions: bool, embedding_norm: bool, final_norm: bool) -> Tensors:
    """Transformer of Vaswani et al. (2017) with biases and LayerNorm, as BART has it."""
    width = model["d_model"]
    tensors: Tensors = {}
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        hidden = model[f"{side}_ffn_dim"]
        layer = linear("fc1", hidden, width) | linear("fc2", width, hidden) | norm("final_layer_norm", width)
        for attention in attentions:
            layer |= norm(f"{attention}_layer_norm", width)
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                layer |= linear(f"{attention}.{part}", width, width)
        tensors |= stack(f"model.{side}.layers", model[f"{side}_layers"], layer)
        if learned_positions:
            tensors |= table(f"model.{side}.embed_positions", model["max_position_embeddings"] + 2, width)
        if embedding_norm:
            tensors |= norm(f"model.{side}.layernorm_embedding", width)
        if final_norm:
            tensors |= norm(f"model.{side}.layer_norm", width)
    return tensors


def _tables(model: ModelJson) -> Tensors:
    """One shared table; untied: shared, encoder, decoder and output tables."""
    size = model["vocab_size"], model["d_model"]
    tensors = table("model.shared", *size)
    if not model.get("tie_word_embeddings", True):
        tensors |= table("model.encoder.embed_tokens", *size) | table("model.decoder.embed_tokens", *size)
        tensors |= head(table("lm_head", *size))
    return tensors


def _classifier(width: int, num_labels: int) -> Tensors:
    return head(under("classification_head", linear("dense", width, width) | linear("out_proj", num_labels, width)))
