"""AdaLoRA's choice of ranks (Zhang et al. 2023), for masters that lie anywhere.

The update of a matrix is B diag(E) A, with one triplet (column of B, value of E, row of A) for each rank. A triplet's
importance is the smoothed sensitivity |weight x gradient| of its elements times how much that varies; as the budget of
ranks falls, the E of the least important ones become zero. PEFT's own allocator wants whole weights and gradients. Here
gradients are collected by hooks, before DeepSpeed has them, and the smoothed values lie beside the optimizer's moments:
sharded as they are, and in every checkpoint.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from harness.engine.fragments import Holder, Piece, base_optimizer, holders, is_replicated, publish_masters

TRIPLET_PART = re.compile(r"(.*)\.lora_([ABE])\.default")
SENSITIVITY, VARIATION = "adalora_sensitivity", "adalora_variation"


class _Part(NamedTuple):
    """One of the three tensors of a matrix: `first` is the number of its first triplet among those of the model."""

    letter: str
    rank: int
    first: int


class RankAllocator:
    """Watches the AdaLoRA parameters of an engine; call `after_step` after every optimizer step.

    Its settings are those of PEFT's AdaLoraConfig in the model. It also adds the gradient of the penalty that keeps the
    rows of A and the columns of B orthonormal: once a step, whatever the number of micro-steps and ranks.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.settings = engine, engine.module.peft_config["default"]
        self.gradients: dict[str, Tensor] = {}
        self.parts = self._find_parts()
        self.num_triplets = sum(part.rank for part in self.parts.values() if part.letter == "E")
        self.target: int = self.settings.target_r * sum(part.letter == "E" for part in self.parts.values())
        for name, parameter in engine.module.named_parameters():
            if name in self.parts:
                parameter.register_hook(partial(self._collect, name, parameter))

    @torch.no_grad()
    def after_step(self, step: int, *, applied: bool) -> None:
        """Learn from the gradients of step number `step` (from 1) and, when it is time, set values to zero.

        A collective. Nothing is learnt of a step that was not applied.
        """
        gradients, self.gradients = self.gradients, {}
        if not applied:
            return
        settings, found = self.settings, holders(self.engine)
        if step < settings.total_step - settings.tfinal:
            for name in sorted(gradients):
                dist.all_reduce(gradients[name])
                gradients[name] /= dist.get_world_size()
            for holder in found:
                self._update(holder, gradients)
        budget = self.budget(step)
        if budget is not None and budget < self.num_triplets:
            self._keep_most_important(found, budget)

    def budget(self, step: int) -> int | None:
        """Ranks of all matrices together that step number `step` leaves; None: it leaves them as they are."""
        settings = self.settings
        falls_until = settings.total_step - settings.tfinal
        if step >= falls_until:
            return self.target
        if step <= settings.tinit or step % settings.deltaT:
            return None
        left = 1 - (step - settings.tinit) / (falls_until - settings.tinit)
        return int((self.num_triplets - self.target) * left**3 + self.target)

    def _find_parts(self) -> dict[str, _Part]:
        """Parts by parameter name; the triplets of a matrix have the same numbers in all three."""
        parts: dict[str, _Part] = {}
        first_of: dict[str, int] = {}
        num_triplets = 0
        for name, parameter in self.engine.module.named_parameters():
            if match := TRIPLET_PART.fullmatch(name):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                rank = int(shape[1] if match[2] == "B" else shape[0])
                if match[1] not in first_of:
                    first_of[match[1]], num_triplets = num_triplets, num_triplets + rank
                parts[name] = _Part(match[2], rank, first_of[match[1]])
        return parts

    def _collect(self, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Hook of the backward pass of one micro-step."""
        letter = self.parts[name].letter
        if name not in self.gradients and letter != "E":
            num_matrices = 2 * sum(part.letter == "E" for part in self.parts.values())
            weight = parameter.detach().float()
            penalty = _orthogonality_gradient(weight if letter == "A" else weight.T)
            scale = self.settings.orth_reg_weight / num_matrices
            gradient = gradient + (scale * (penalty if letter == "A" else penalty.T)).to(gradient.dtype)
        kept = gradient.detach().float()
        self.gradients[name] = self.gradients[name] + kept if name in self.gradients else kept.clone()
        return gradient

    def _update(self, holder: Holder, gradients: dict[str, Tensor]) -> None:
        """Smooth the sensitivity of every element of a holder, and its distance from the smoothed one."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        with holder.resident(True):
            state = base_optimizer(self.engine).state[holder.tensor]
            for key in (SENSITIVITY, VARIATION):
                state.setdefault(key, torch.zeros_like(holder.tensor))
            for piece in self._pieces(holder):
                weight, mean, variation = (
                    _slice(tensor, piece) for tensor in (holder.tensor, state[SENSITIVITY], state[VARIATION])
                )
                flat = gradients[piece.name].view(-1)[piece.start : piece.start + piece.numel]
                sensitivity = (weight * flat.to(weight.device)).abs()
                mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
                variation.mul_(beta2).add_((sensitivity - mean).abs(), alpha=1 - beta2)

    def _keep_most_important(self, found: list[Holder], budget: int) -> None:
        scores = self._scores(found)
        threshold = scores.kthvalue(self.num_triplets - budget).values
        for holder in found:
            with holder.resident(True):
                for piece in self._pieces(holder):
                    if self.parts[piece.name].letter == "E":
                        _slice(holder.tensor, piece)[scores[self._triplets(piece)] <= threshold] = 0.0
        publish_masters(self.engine)

    def _scores(self, found: list[Holder]) -> Tensor:
        """Importance of each triplet: the sum over its three parts of the mean over their elements."""
        scores = torch.zeros(self.num_triplets, dtype=torch.float64)
        for holder in found:
            with holder.resident(False):
                state = base_optimizer(self.engine).state[holder.tensor]
                for piece in self._pieces(holder):
                    elements = _slice(state[SENSITIVITY], piece) * _slice(state[VARIATION], piece)
                    length = torch.Size(piece.shape).numel() // self.parts[piece.name].rank
                    scores.index_add_(0, self._triplets(piece), elements.double().cpu() / length)
        device = self.engine.device
        scores = scores.to(device)
        if not is_replicated(self.engine):
            dist.all_reduce(scores)
        return scores.cpu()

    def _pieces(self, holder: Holder) -> list[Piece]:
        return [piece for piece in holder.pieces if piece.name in self.parts]

    def _triplets(self, piece: Piece) -> Tensor:
        """Number of the triplet that each element of a piece belongs to."""
        part, element = self.parts[piece.name], torch.arange(piece.start, piece.start + piece.numel)
        columns = piece.shape[1]
        return part.first + (element % columns if part.letter == "B" else element // columns)


def _slice(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor.view(-1)[piece.offset : piece.offset + piece.numel]


def _orthogonality_gradient(rows: Tensor) -> Tensor:
    """Gradient of the Frobenius norm of R R^T - 1 for the rows R [r, width]."""
    off = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    gradient: Tensor = 2 * off @ rows / off.norm().clamp_min(1e-12)
    return gradient
