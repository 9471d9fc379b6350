"""Label-smoothed cross entropy as a pure function of logits and labels.

Shapes: B rows, T target positions, V vocabulary entries.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Convention = Literal["fairseq", "torch"]


class LossTerms(NamedTuple):
    """Sums over the counted targets, in float32; the caller divides by the targets of the whole step."""

    loss_sum: Tensor
    nll_sum: Tensor
    num_targets: Tensor


def label_smoothed_cross_entropy(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    *,
    epsilon: float = 0.0,
    convention: Convention = "fairseq",
    ignore_index: int = -100,
) -> LossTerms:
    """Cross entropy against a smoothed target distribution q, summed over all labels that are not `ignore_index`.

    `fairseq`: q(gold) = 1 - eps and eps / (V - 1) on every other token
    (fairseq/criterions/label_smoothed_cross_entropy.py).
    `torch`: q(gold) = 1 - eps + eps / V and eps / V on every other token (torch.nn.functional.cross_entropy).
    A vocabulary column whose logit is -inf can never be predicted: it takes no part in q, and V does not count it.
    """
    counted_BT = labels_BT != ignore_index
    logits_NV = logits_BTV[counted_BT].float()
    labels_N = labels_BT[counted_BT]
    log_normaliser_N = torch.logsumexp(logits_NV, dim=-1)
    nll_N = log_normaliser_N - logits_NV.gather(-1, labels_N[:, None]).squeeze(-1)
    nll_sum = nll_N.sum()
    if epsilon == 0.0:
        return LossTerms(nll_sum, nll_sum.detach(), counted_BT.sum())
    mean_logit_N, num_columns_N = _mean_over_possible(logits_NV)
    uniform_N = log_normaliser_N - mean_logit_N  # cross entropy against the uniform distribution
    uniform_weight_N = epsilon * num_columns_N / (num_columns_N - 1) if convention == "fairseq" else epsilon
    loss_N = (1.0 - uniform_weight_N) * nll_N + uniform_weight_N * uniform_N
    return LossTerms(loss_N.sum(), nll_sum.detach(), counted_BT.sum())


def _mean_over_possible(logits_NV: Tensor) -> tuple[Tensor, Tensor | int]:
    """Mean logit of the columns that are not -inf, and how many those are."""
    mean_logit_N = logits_NV.mean(dim=-1)
    if not torch.isneginf(mean_logit_N).any():
        return mean_logit_N, logits_NV.shape[-1]
    possible_NV = ~torch.isneginf(logits_NV)
    num_columns_N = possible_NV.sum(dim=-1)
    return logits_NV.masked_fill(~possible_NV, 0.0).sum(dim=-1) / num_columns_N, num_columns_N
