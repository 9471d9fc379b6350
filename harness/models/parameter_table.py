"""How much of a model is trained, by part."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from harness.models.layers import embedding_names, layer_places

ADAPTER_PART = re.compile(r"(^|\.)(lora_\w+|ia3_l|ranknum|prompt_encoder|bottleneck)\.")
PARTS = ("embeddings", "encoder", "decoder", "layers", "rest", "saved whole", "adapter")
SAVED_PART = re.compile(r"\.modules_to_save\.")


def parameter_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(trained, frozen) numbers of each of PARTS that the model has.

    Weights packed in 4 bits and weights that ZeRO-3 has sharded count as what they stand for.
    """
    counts: dict[str, tuple[int, int]] = {}
    places, embeddings = layer_places(name for name, _ in model.named_parameters()), embedding_names(model)
    stacks = {name: place.stack for name, place in places.items()}
    for name, parameter in model.named_parameters():
        part = _part(name, stacks, embeddings)
        trained, frozen = counts.get(part, (0, 0))
        number = num_weights(parameter)
        counts[part] = (trained + number, frozen) if parameter.requires_grad else (trained, frozen + number)
    return {part: counts[part] for part in PARTS if part in counts}


def parameter_table(model: nn.Module) -> str:
    """A line for each part with its trained, frozen and total numbers, and the sum of all."""
    counts = parameter_counts(model)
    sums = (sum(trained for trained, _ in counts.values()), sum(frozen for _, frozen in counts.values()))
    lines = [f"{'part':<12} {'trained':>15} {'frozen':>15} {'total':>15} {'trained %':>10}"]
    for part, (trained, frozen) in [*counts.items(), ("total", sums)]:
        total = trained + frozen
        lines.append(f"{part:<12} {trained:>15,} {frozen:>15,} {total:>15,} {100 * trained / max(1, total):>10.3f}")
    return "\n".join(lines)


def num_weights(parameter: nn.Parameter) -> int:
    """Number of weights that a parameter stands for."""
    stored = int(getattr(parameter, "ds_numel", parameter.numel()))
    if type(parameter).__name__ == "Params4bit":  # two in each byte
        return stored * parameter.element_size() * 2
    return stored


def _part(name: str, stacks: Mapping[str, str], embeddings: set[str]) -> str:
    if ADAPTER_PART.search(name):
        return "adapter"
    if SAVED_PART.search(name):
        return "saved whole"
    if name in embeddings:
        return "embeddings"
    return stacks.get(name, "rest")
