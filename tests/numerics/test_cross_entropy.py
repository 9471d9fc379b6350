"""The objective and its gradient against torch and against the definition, written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.objectives.cross_entropy import Convention, LossTerms, label_smoothed_cross_entropy

NUM_ROWS, LENGTH, VOCABULARY = 4, 7, 23
IGNORED = -100
EPSILONS = [0.0, 0.1, 0.2, 0.9]
CONVENTIONS: list[Convention] = ["fairseq", "torch"]


def random_batch(seed: int = 0, *, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] in float32, and labels [B, T] with padding at the end of three rows."""
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = scale * torch.randn(NUM_ROWS, LENGTH, VOCABULARY, generator=generator)
    labels_BT = torch.randint(0, VOCABULARY, (NUM_ROWS, LENGTH), generator=generator)
    for row, length in enumerate((7, 5, 1, 3)):
        labels_BT[row, length:] = IGNORED
    return logits_BTV, labels_BT


def by_definition(logits_BTV: Tensor, labels_BT: Tensor, epsilon: float, convention: Convention) -> Tensor:
    """Sum over target tokens of -sum_k q(k) log p(k), in float64; impossible tokens (logit -inf) have q = 0.

    fairseq: q = 1 - eps for the gold token, eps / (V - 1) for each other one.
    torch (Szegedy et al. 2016, section 7): q = (1 - eps) [k is gold] + eps / V.
    """
    total = torch.zeros((), dtype=torch.float64)
    for logits_TV, labels_T in zip(logits_BTV.double(), labels_BT.tolist(), strict=True):
        for logits_V, gold in zip(logits_TV, labels_T, strict=True):
            if gold == IGNORED:
                continue
            possible = [k for k in range(len(logits_V)) if logits_V[k] != -torch.inf]
            log_p = logits_V - torch.log(torch.exp(logits_V[possible]).sum())
            for k in possible:
                if convention == "fairseq":
                    q = 1 - epsilon if k == gold else epsilon / (len(possible) - 1)
                else:
                    q = (1 - epsilon if k == gold else 0.0) + epsilon / len(possible)
                total = total - q * log_p[k]
    return total


def loss_and_gradient(
    logits_BTV: Tensor, labels_BT: Tensor, epsilon: float, convention: Convention
) -> tuple[LossTerms, Tensor]:
    leaf_BTV = logits_BTV.clone().requires_grad_()
    loss = label_smoothed_cross_entropy(leaf_BTV, labels_BT, epsilon=epsilon, convention=convention)
    loss.loss_sum.backward()
    assert leaf_BTV.grad is not None
    return loss, leaf_BTV.grad


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_loss_and_gradient_are_those_of_the_definition(epsilon: float, convention: Convention) -> None:
    logits_BTV, labels_BT = random_batch()
    loss, gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, epsilon, convention)
    leaf_BTV = logits_BTV.double().requires_grad_()
    expected = by_definition(leaf_BTV, labels_BT, epsilon, convention)
    expected.backward()
    assert loss.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient_BTV.double(), leaf_BTV.grad, rtol=1e-5, atol=1e-6)
    assert loss.num_targets.item() == 16
    assert loss.nll_sum.item() == pytest.approx(by_definition(logits_BTV, labels_BT, 0.0, convention).item(), rel=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_torch_convention_is_that_of_torch(epsilon: float) -> None:
    logits_BTV, labels_BT = random_batch(1)
    loss, gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, epsilon, "torch")
    leaf_BTV = logits_BTV.clone().requires_grad_()
    expected = F.cross_entropy(leaf_BTV.flatten(0, 1), labels_BT.flatten(), label_smoothing=epsilon, reduction="sum")
    expected.backward()
    assert loss.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient_BTV, leaf_BTV.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS[:-1])
def test_one_convention_is_the_other_with_another_epsilon(epsilon: float) -> None:
    """fairseq(eps (V - 1) / V) = torch(eps)."""
    logits_BTV, labels_BT = random_batch(2)
    ours = label_smoothed_cross_entropy(
        logits_BTV, labels_BT, epsilon=epsilon * (VOCABULARY - 1) / VOCABULARY, convention="fairseq"
    )
    other = label_smoothed_cross_entropy(logits_BTV, labels_BT, epsilon=epsilon, convention="torch")
    assert ours.loss_sum.item() == pytest.approx(other.loss_sum.item(), rel=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_an_impossible_column_counts_as_absent(epsilon: float, convention: Convention) -> None:
    """Loss and gradient are finite, and those of a vocabulary without the column; torch's own smoothed loss is inf."""
    logits_BTV, labels_BT = random_batch(3)
    possible = torch.tensor([k for k in range(VOCABULARY) if k not in (0, 11)])
    labels_BT = torch.where(torch.isin(labels_BT, possible) | (labels_BT == IGNORED), labels_BT, 1)
    small_labels_BT = torch.where(labels_BT == IGNORED, IGNORED, torch.searchsorted(possible, labels_BT))
    logits_BTV[..., [0, 11]] = -torch.inf

    loss, gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, epsilon, convention)
    small, small_gradient_BTV = loss_and_gradient(logits_BTV[..., possible], small_labels_BT, epsilon, convention)
    assert loss.loss_sum.item() == pytest.approx(small.loss_sum.item(), rel=1e-6)
    assert loss.loss_sum.item() == pytest.approx(
        by_definition(logits_BTV, labels_BT, epsilon, convention).item(), rel=1e-6
    )
    torch.testing.assert_close(gradient_BTV[..., possible], small_gradient_BTV, rtol=1e-5, atol=1e-6)
    assert (gradient_BTV[..., [0, 11]] == 0).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_columns_may_be_impossible_at_some_positions_only(convention: Convention) -> None:
    logits_BTV, labels_BT = random_batch(4)
    labels_BT[labels_BT == 5] = 6
    logits_BTV[0, 2:, 5] = -torch.inf
    loss, gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, 0.1, convention)
    expected = by_definition(logits_BTV, labels_BT, 0.1, convention)
    assert loss.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(gradient_BTV).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_ignored_positions_have_no_loss_and_no_gradient_whatever_stands_there(
    epsilon: float, convention: Convention
) -> None:
    logits_BTV, labels_BT = random_batch(5)
    clean, clean_gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, epsilon, convention)
    ignored_BT = labels_BT == IGNORED
    logits_BTV[ignored_BT] = torch.nan
    loss, gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, epsilon, convention)
    assert loss.loss_sum.equal(clean.loss_sum)
    assert gradient_BTV.equal(clean_gradient_BTV)
    assert (gradient_BTV[ignored_BT] == 0).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_a_batch_without_target_tokens_gives_exactly_zero(epsilon: float, convention: Convention) -> None:
    """What a rank short of rows computes: it takes part in the backward pass and changes nothing."""
    logits_BTV = torch.randn(1, 1, VOCABULARY)
    loss, gradient_BTV = loss_and_gradient(logits_BTV, torch.tensor([[IGNORED]]), epsilon, convention)
    assert [term.item() for term in loss] == [0.0, 0.0, 0]
    assert (gradient_BTV == 0).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_another_id_can_be_the_ignored_one(convention: Convention) -> None:
    logits_BTV, labels_BT = random_batch(6)
    padded_BT = torch.where(labels_BT == IGNORED, 1, torch.where(labels_BT == 1, 2, labels_BT))
    same_BT = torch.where(padded_BT == 1, IGNORED, padded_BT)
    ours = label_smoothed_cross_entropy(logits_BTV, padded_BT, epsilon=0.1, convention=convention, ignore_index=1)
    expected = label_smoothed_cross_entropy(logits_BTV, same_BT, epsilon=0.1, convention=convention)
    assert ours.loss_sum.equal(expected.loss_sum)
    assert ours.num_targets.equal(expected.num_targets)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bfloat16_logits_are_computed_in_float32(convention: Convention) -> None:
    logits_BTV, labels_BT = random_batch(7)
    half_BTV = logits_BTV.bfloat16()
    loss, gradient_BTV = loss_and_gradient(half_BTV, labels_BT, 0.1, convention)
    expected, expected_gradient_BTV = loss_and_gradient(half_BTV.float(), labels_BT, 0.1, convention)
    assert loss.loss_sum.dtype == loss.nll_sum.dtype == torch.float32
    assert loss.loss_sum.equal(expected.loss_sum)
    assert gradient_BTV.equal(expected_gradient_BTV.bfloat16())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_large_logits_do_not_overflow(convention: Convention) -> None:
    logits_BTV, labels_BT = random_batch(8, scale=1e4)
    loss, gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, 0.1, convention)
    log_p_BTV = torch.log_softmax(logits_BTV.double(), dim=-1)
    counted_BT = labels_BT != IGNORED
    nll = -log_p_BTV[counted_BT].gather(-1, labels_BT[counted_BT][:, None]).sum()
    assert loss.nll_sum.item() == pytest.approx(nll.item(), rel=1e-6)
    assert torch.isfinite(gradient_BTV).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_sum_does_not_depend_on_how_a_batch_is_cut(convention: Convention) -> None:
    logits_BTV, labels_BT = random_batch(9)
    whole, whole_gradient_BTV = loss_and_gradient(logits_BTV, labels_BT, 0.2, convention)
    parts = [loss_and_gradient(logits_BTV[rows], labels_BT[rows], 0.2, convention) for rows in ([0], [1, 3], [2])]
    assert sum(loss.loss_sum.item() for loss, _ in parts) == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    assert sum(int(loss.num_targets) for loss, _ in parts) == int(whole.num_targets)
    torch.testing.assert_close(torch.cat([part for _, part in parts])[[0, 1, 3, 2]], whole_gradient_BTV)
