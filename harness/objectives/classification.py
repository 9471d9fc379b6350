"""Losses of whole rows as pure functions of logits and labels: one of K labels, any of K labels, or a number.

Shapes: B rows, K labels. Only the first `len(labels)` rows of the logits count: a rank short of rows sends a row
without a label through the model, and its loss and gradient are exactly zero. The caller divides by the rows of the
whole step, whatever their weights, so the gradient does not depend on how a step is cut. All sums are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.objectives.cross_entropy import Convention, LossTerms

# Of 1 - p: where p rounds to 1, the derivative of (1 - p)^gamma would be infinite for gamma < 1.
_MIN_RESIDUE = torch.finfo(torch.float32).eps


def single_label_loss(
    logits_BK: Tensor,
    labels_B: Tensor,
    *,
    epsilon: float = 0.0,
    convention: Convention = "torch",
    gamma: float = 0.0,
    weights_K: Tensor | None = None,
) -> LossTerms:
    """Sum over rows of -sum_k w_k q_k (1 - p_k)^gamma log p_k, p the softmax of the logits.

    q is the smoothed label: `torch`: 1 - eps + eps / K for the gold label and eps / K for each other one (equal to
    torch.nn.functional.cross_entropy with weight, label_smoothing and reduction="sum"); `fairseq`: 1 - eps and
    eps / (K - 1). gamma is that of the focal loss, equation 5 of Lin et al. 2017 (arXiv:1708.02002).
    nll_sum is that of the plain loss: no smoothing, focus or weight.
    """
    log_p_BK = F.log_softmax(logits_BK[: len(labels_B)].float(), dim=-1)
    q_BK = _smoothed(F.one_hot(labels_B, log_p_BK.shape[-1]).float(), epsilon, convention, log_p_BK.shape[-1])
    terms_BK = -_focus(log_p_BK, gamma) * q_BK * log_p_BK
    if weights_K is not None:
        terms_BK = terms_BK * weights_K
    nll_B = -log_p_BK.detach().gather(-1, labels_B[:, None])
    return _sums(terms_BK.sum(), nll_B.sum(), len(labels_B))


def multi_label_loss(
    logits_BK: Tensor,
    labels_BK: Tensor,
    *,
    epsilon: float = 0.0,
    convention: Convention = "torch",
    gamma: float = 0.0,
    weights_K: Tensor | None = None,
) -> LossTerms:
    """Sum over rows of the mean over labels of the binary loss, each label being a choice between yes and no.

    labels_BK holds 1 where a row has the label, else 0. Without options this is B times
    torch.nn.functional.binary_cross_entropy_with_logits. Smoothing, focus and weights are those of `single_label_loss`
    with two classes; w_k weighs both answers to label k.
    """
    logits_BK = logits_BK[: len(labels_BK)].float()
    yes_BK = labels_BK.float()
    q_BK = _smoothed(yes_BK, epsilon, convention, 2)
    log_yes_BK, log_no_BK = F.logsigmoid(logits_BK), F.logsigmoid(-logits_BK)
    terms_BK = -_focus(log_yes_BK, gamma) * q_BK * log_yes_BK - _focus(log_no_BK, gamma) * (1.0 - q_BK) * log_no_BK
    if weights_K is not None:
        terms_BK = terms_BK * weights_K
    nll_BK = F.binary_cross_entropy_with_logits(logits_BK.detach(), yes_BK, reduction="none")
    num_labels = logits_BK.shape[-1]
    return _sums(terms_BK.sum() / num_labels, nll_BK.sum() / num_labels, len(labels_BK))


def regression_loss(logits_B1: Tensor, labels_B: Tensor) -> LossTerms:
    """Sum over rows of the squared error."""
    errors_B = logits_B1[: len(labels_B), 0].float() - labels_B.float()
    loss_sum = (errors_B * errors_B).sum()
    return _sums(loss_sum, loss_sum.detach(), len(labels_B))


def _smoothed(hot: Tensor, epsilon: float, convention: Convention, num_choices: int) -> Tensor:
    """`hot` (1 for gold, else 0) with `epsilon` of its mass spread over the choices."""
    other = epsilon / (num_choices if convention == "torch" else num_choices - 1)
    return hot * (1.0 - num_choices * other) + other


def _focus(log_p: Tensor, gamma: float) -> Tensor | float:
    """(1 - p)^gamma, with its gradient."""
    return (-torch.expm1(log_p)).clamp_min(_MIN_RESIDUE) ** gamma if gamma else 1.0


def _sums(loss_sum: Tensor, nll_sum: Tensor, num_rows: int) -> LossTerms:
    return LossTerms(loss_sum, nll_sum, torch.full((), num_rows, device=loss_sum.device))
