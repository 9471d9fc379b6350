"""Losses of whole rows against torch, and against their formulas written out term by term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.objectives.classification import multi_label_loss, regression_loss, single_label_loss
from harness.objectives.cross_entropy import LossTerms

NUM_ROWS, NUM_LABELS = 9, 5
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])
Loss = Callable[..., LossTerms]


def logits_of(seed: int = 0, *, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(NUM_ROWS, NUM_LABELS, generator=torch.Generator().manual_seed(seed))


def labels_of(loss: Loss, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if loss is single_label_loss:
        return torch.randint(NUM_LABELS, (NUM_ROWS,), generator=generator)
    if loss is multi_label_loss:
        return torch.randint(2, (NUM_ROWS, NUM_LABELS), generator=generator)
    return torch.randn(NUM_ROWS, generator=generator)


def with_gradient(loss: Loss, logits: Tensor, labels: Tensor, **options: Any) -> tuple[LossTerms, Tensor]:
    leaf = logits.clone().requires_grad_()
    terms = loss(leaf, labels, **options)
    terms.loss_sum.backward()
    assert leaf.grad is not None
    return terms, leaf.grad


def torch_gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
def test_single_label_loss_is_that_of_torch(epsilon: float, weights: Tensor | None) -> None:
    logits, labels = logits_of(), labels_of(single_label_loss)
    terms, gradient = with_gradient(single_label_loss, logits, labels, epsilon=epsilon, weights_K=weights)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, labels, weight=weights, label_smoothing=epsilon, reduction="sum")
    torch.testing.assert_close(terms.loss_sum, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch_gradient(expected, leaf), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.nll_sum, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-6, atol=0)
    assert terms.num_targets.item() == NUM_ROWS


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_multi_label_loss_is_that_of_torch(weights: Tensor | None) -> None:
    logits, labels = logits_of(), labels_of(multi_label_loss)
    terms, gradient = with_gradient(multi_label_loss, logits, labels, weights_K=weights)
    leaf = logits.clone().requires_grad_()
    expected = F.binary_cross_entropy_with_logits(leaf, labels.float(), weight=weights) * NUM_ROWS
    torch.testing.assert_close(terms.loss_sum, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch_gradient(expected, leaf), rtol=1e-5, atol=1e-6)
    plain = F.binary_cross_entropy_with_logits(logits, labels.float()) * NUM_ROWS
    torch.testing.assert_close(terms.nll_sum, plain, rtol=1e-6, atol=0)
    assert terms.num_targets.item() == NUM_ROWS


def test_regression_loss_is_that_of_torch() -> None:
    logits, labels = logits_of()[:, :1], labels_of(regression_loss)
    terms, gradient = with_gradient(regression_loss, logits, labels)
    leaf = logits.clone().requires_grad_()
    expected = F.mse_loss(leaf[:, 0], labels, reduction="sum")
    torch.testing.assert_close(terms.loss_sum, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch_gradient(expected, leaf), rtol=1e-5, atol=1e-6)
    assert terms.nll_sum.equal(terms.loss_sum.detach())


def by_formula(
    loss: Loss, logits: Tensor, labels: Tensor, epsilon: float, fairseq: bool, gamma: float, weights: Tensor
) -> Tensor:
    """-sum w q (1 - p)^gamma log p in float64, choice by choice (Lin et al. 2017, equation 5, for a smoothed q)."""
    num_choices = NUM_LABELS if loss is single_label_loss else 2
    other = epsilon / (num_choices - 1 if fairseq else num_choices)
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        if loss is single_label_loss:
            p = row.exp() / row.exp().sum()
            choices = [(weights[k], p[k], k == label) for k in range(NUM_LABELS)]
        else:
            yes = 1 / (1 + (-row).exp())
            choices = [(weights[k] / NUM_LABELS, yes[k], label[k] == 1) for k in range(NUM_LABELS)]
            choices += [(weights[k] / NUM_LABELS, 1 - yes[k], label[k] == 0) for k in range(NUM_LABELS)]
        for weight, p_choice, is_gold in choices:
            q = 1 - (num_choices - 1) * other if is_gold else other
            total = total - weight.double() * q * (1 - p_choice) ** gamma * p_choice.log()
    return total


@pytest.mark.parametrize("loss", [single_label_loss, multi_label_loss])
@pytest.mark.parametrize("convention", ["torch", "fairseq"])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_and_its_gradient_are_those_of_the_formula(
    loss: Loss, convention: str, epsilon: float, gamma: float
) -> None:
    logits, labels = logits_of(2), labels_of(loss, 3)
    terms, gradient = with_gradient(
        loss, logits, labels, epsilon=epsilon, convention=convention, gamma=gamma, weights_K=WEIGHTS
    )
    leaf = logits.double().requires_grad_()
    expected = by_formula(loss, leaf, labels, epsilon, convention == "fairseq", gamma, WEIGHTS)
    assert terms.loss_sum.item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(gradient.double(), torch_gradient(expected, leaf), rtol=1e-5, atol=1e-6)


def test_a_focused_loss_asks_less_of_rows_that_are_right() -> None:
    """With p = 0.9 the loss at gamma = 2 is a hundredth of the cross entropy (Lin et al. 2017, section 3.2)."""
    logits = torch.tensor([[torch.log(torch.tensor(9.0)), 0.0]])
    plain, focal = (single_label_loss(logits, torch.tensor([0]), gamma=gamma).loss_sum.item() for gamma in (0.0, 2.0))
    assert plain / focal == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("loss", [single_label_loss, multi_label_loss])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_sure_rows_have_finite_gradients(loss: Loss, gamma: float) -> None:
    """Of logits of 1000, right and wrong, p is 1 or 0 in float32."""
    logits, labels = logits_of(4, scale=1000.0), labels_of(loss, 5)
    terms, gradient = with_gradient(loss, logits, labels, gamma=gamma, epsilon=0.1)
    assert torch.isfinite(terms.loss_sum)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [single_label_loss, multi_label_loss, regression_loss])
def test_a_batch_without_labels_gives_exactly_zero(loss: Loss) -> None:
    """What a rank short of rows computes: it takes part in the backward pass and changes nothing."""
    terms, gradient = with_gradient(loss, logits_of()[:1], labels_of(loss)[:0])
    assert [term.item() for term in terms] == [0.0, 0.0, 0]
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss", [single_label_loss, multi_label_loss, regression_loss])
def test_the_sum_does_not_depend_on_how_a_batch_is_cut(loss: Loss) -> None:
    logits, labels = logits_of(6), labels_of(loss, 7)
    options: dict[str, Any] = {} if loss is regression_loss else {"gamma": 1.5, "epsilon": 0.1, "weights_K": WEIGHTS}
    whole, whole_gradient = with_gradient(loss, logits, labels, **options)
    cuts = [slice(0, 1), slice(1, 6), slice(6, None)]
    parts = [with_gradient(loss, logits[cut], labels[cut], **options) for cut in cuts]
    assert sum(terms.loss_sum.item() for terms, _ in parts) == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), whole_gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [single_label_loss, multi_label_loss, regression_loss])
def test_bfloat16_logits_are_computed_in_float32(loss: Loss) -> None:
    logits, labels = logits_of(8).bfloat16(), labels_of(loss, 9)
    terms, gradient = with_gradient(loss, logits, labels)
    expected, expected_gradient = with_gradient(loss, logits.float(), labels)
    assert terms.loss_sum.dtype == terms.nll_sum.dtype == torch.float32
    assert terms.loss_sum.equal(expected.loss_sum)
    assert gradient.equal(expected_gradient.bfloat16())
