"""Tensors of the encoder families with their classification heads."""

from __future__ import annotations

from collections.abc import Callable

from harness.plan.tensors import ModelJson, Tensor, Tensors, head, linear, norm, stack, table, under


def _bert_body(model: ModelJson, *, query: str, types: bool = True, positions: bool = True) -> Tensors:
    """BERT (Devlin et al. 2019). ``query``: how its attention names the three projections."""
    width, hidden = model["hidden_size"], model["intermediate_size"]
    embeddings = table("word_embeddings", model["vocab_size"], width) | norm("LayerNorm", width)
    if positions:
        embeddings |= table("position_embeddings", model["max_position_embeddings"], width)
    if types and model.get("type_vocab_size", 2):
        embeddings |= table("token_type_embeddings", model.get("type_vocab_size", 2), width)
    layer = linear("attention.output.dense", width, width) | norm("attention.output.LayerNorm", width)
    for part in ("query", "key", "value"):
        layer |= linear(f"attention.self.{query.format(part)}", width, width)
    layer |= linear("intermediate.dense", hidden, width) | linear("output.dense", width, hidden)
    layer |= norm("output.LayerNorm", width)
    return under("embeddings", embeddings) | stack("encoder.layer", model["num_hidden_layers"], layer)


def _bert(model: ModelJson, num_labels: int) -> Tensors:
    width = model["hidden_size"]
    parts = linear("bert.pooler.dense", width, width) | linear("classifier", num_labels, width)
    return under("bert", _bert_body(model, query="{}")) | head(parts)


def _roberta(model: ModelJson, num_labels: int) -> Tensors:
    width = model["hidden_size"]
    parts = linear("classifier.dense", width, width) | linear("classifier.out_proj", num_labels, width)
    return under("roberta", _bert_body(model, query="{}")) | head(parts)


def _distilbert(model: ModelJson, num_labels: int) -> Tensors:
    width, hidden = model["dim"], model["hidden_dim"]
    layer = norm("sa_layer_norm", width) | norm("output_layer_norm", width)
    for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
        layer |= linear(f"attention.{part}", width, width)
    layer |= linear("ffn.lin1", hidden, width) | linear("ffn.lin2", width, hidden)
    body = table("embeddings.word_embeddings", model["vocab_size"], width) | norm("embeddings.LayerNorm", width)
    body |= table("embeddings.position_embeddings", model["max_position_embeddings"], width)
    body |= stack("transformer.layer", model["n_layers"], layer)
    parts = linear("pre_classifier", width, width) | linear("classifier", num_labels, width)
    return under("distilbert", body) | head(parts)


def _deberta_v2(model: ModelJson, num_labels: int) -> Tensors | None:
    """DeBERTa v2 and v3 (He et al. 2021), with relative positions shared by all layers as in the published models."""
    width = model["hidden_size"]
    if model.get("embedding_size", width) != width or not (model["relative_attention"] and model["share_att_key"]):
        return None
    types, absolute = model.get("type_vocab_size", 0) > 0, model.get("position_biased_input", True)
    body = _bert_body(model, query="{}_proj", types=types, positions=absolute)
    buckets = model["position_buckets"] if model.get("position_buckets", -1) > 0 else model["max_relative_positions"]
    if buckets < 1:
        buckets = model["max_position_embeddings"]
    body |= table("encoder.rel_embeddings", 2 * buckets, width)
    if "layer_norm" in model.get("norm_rel_ebd", "none"):
        body |= norm("encoder.LayerNorm", width)
    if kernel := model.get("conv_kernel_size", 0):
        body |= {"encoder.conv.conv.weight": Tensor((width, width, kernel)), "encoder.conv.conv.bias": Tensor((width,))}
        body |= norm("encoder.conv.LayerNorm", width)
    return under("deberta", body) | head(linear("pooler.dense", width, width) | linear("classifier", num_labels, width))


ENCODERS: dict[str, Callable[[ModelJson, int], Tensors | None]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "distilbert": _distilbert,
    "deberta-v2": _deberta_v2,
}
