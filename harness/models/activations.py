"""What happens to activations in training: dropout rates, recomputation in the backward pass, noise on embeddings.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from harness.config.schema import GradientCheckpointingConfig, ModelConfig
from harness.errors import ConfigError

# What the families call the rates: of hidden states and embeddings, and of attention weights. A classifier's rate of
# its own follows the first.
HIDDEN_RATES = (
    "dropout", "dropout_rate", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "resid_dropout",
    "embed_dropout", "embedding_dropout", "mlp_dropout",
)  # fmt: skip
CLASSIFIER_RATES = ("classifier_dropout", "seq_classif_dropout", "pooler_dropout", "cls_dropout")
ATTENTION_RATES = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def override_dropout(config: PreTrainedConfig, model: ModelConfig) -> None:
    """Sets the dropout rates asked for, under the names that the family uses.

    Raises ConfigError if it has no such rate.
    """
    if model.dropout is not None:
        _set_rates(config, HIDDEN_RATES, model.dropout, "model.dropout")
        _set_known(config, CLASSIFIER_RATES, model.dropout)
    if model.attention_dropout is not None:
        _set_rates(config, ATTENTION_RATES, model.attention_dropout, "model.attention_dropout")


def apply_activation_options(model: PreTrainedModel, options: ModelConfig) -> None:
    """Recomputation and noise as the run file asks for, in place. Raises ConfigError if the model cannot do it."""
    if options.gradient_checkpointing:
        recompute(model, options.gradient_checkpointing)
    if options.neftune_alpha is not None:
        add_embedding_noise(model, options.neftune_alpha)


def recompute(model: PreTrainedModel, options: GradientCheckpointingConfig | bool) -> None:
    """Recompute layers 0, k, 2k, ... in the backward pass; their inputs may wait for it in host memory.

    Without an accelerator they lie there anyway. Raises ConfigError if the model has no layers of this kind.
    """
    chosen = options if isinstance(options, GradientCheckpointingConfig) else GradientCheckpointingConfig()
    offload = chosen.offload and torch.accelerator.is_available()
    try:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=chosen.every, offload=offload)
    except ValueError as error:
        what = f"{model.config.model_type} cannot recompute its layers"
        raise ConfigError(what, where="model.gradient_checkpointing", hint="set it to false") from error


def add_embedding_noise(model: PreTrainedModel, alpha: float) -> None:
    """NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1): in training, uniform noise on the input embeddings.

    Each embedding gets U(-1, 1) alpha / sqrt(L D) of torch's global generator, L being the length of its own row: its
    part of a pack, or what is not padding, so that a neighbour does not change it. In an encoder-decoder only the
    encoder's input gets noise.
    """
    stack: Any = model.get_encoder() if model.config.is_encoder_decoder else model.get_decoder()
    lengths: dict[str, Tensor | None] = {}

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            lengths["of_positions"] = position_lengths(kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def noisy(module: nn.Module, args: Any, embeddings_BTD: Tensor) -> Tensor:
        if not lengths:  # not in training, or called by the decoder, which shares the table
            return embeddings_BTD
        return embeddings_BTD + embedding_noise(embeddings_BTD, lengths["of_positions"], alpha)

    stack.register_forward_pre_hook(before, with_kwargs=True)
    stack.register_forward_hook(lambda *_: lengths.clear(), always_call=True)
    stack.get_input_embeddings().register_forward_hook(noisy)


def embedding_noise(embeddings_BTD: Tensor, lengths_BT: Tensor | None, alpha: float) -> Tensor:
    """U(-1, 1) alpha / sqrt(L D) for each value; L is T where `lengths_BT` is None."""
    _, num_positions, width = embeddings_BTD.shape
    noise_BTD = torch.empty_like(embeddings_BTD).uniform_(-1.0, 1.0)
    if lengths_BT is None:
        return noise_BTD * (alpha / math.sqrt(num_positions * width))
    scales_BT = alpha / (lengths_BT * width).float().sqrt()
    return noise_BTD * scales_BT[..., None].to(noise_BTD.dtype)


def position_lengths(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Length [B, T] of the row that each position belongs to, at least 1; None where neither argument tells.

    A row of a pack begins where `position_ids` [B, T] is 0; `attention_mask` [B, T] is 0 on padding.
    """
    if position_ids is not None:
        segments_BT = (position_ids == 0).long().cumsum(dim=1)
        counts_BS = segments_BT.new_zeros(segments_BT.shape[0], segments_BT.shape[1] + 1)
        counts_BS.scatter_add_(1, segments_BT, torch.ones_like(segments_BT))
        return counts_BS.gather(1, segments_BT)
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.long().sum(dim=1, keepdim=True).clamp(min=1).expand_as(attention_mask)
    return None


def _set_rates(config: PreTrainedConfig, names: tuple[str, ...], rate: float, where: str) -> None:
    if not _set_known(config, names, rate):
        others = {"model.dropout": ATTENTION_RATES, "model.attention_dropout": HIDDEN_RATES}[where]
        other = "attention_dropout" if where == "model.dropout" else "dropout"
        hint = f"set model.{other} instead" if any(hasattr(config, name) for name in others) else "remove it"
        raise ConfigError(f"{config.model_type} has no such dropout rate", where=where, hint=hint)


def _set_known(config: PreTrainedConfig, names: tuple[str, ...], rate: float) -> bool:
    """Sets every rate of `names` that the configuration has; whether there is one."""
    known = [name for name in names if hasattr(config, name)]
    for name in known:
        setattr(config, name, rate)
    return bool(known)
