"""The mean of checkpoints in a model, against torch's in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.checkpoint.export import overwrite_parameters
from harness.checkpoint.store import Checkpoint, CheckpointStore, record_file
from harness.engine.fragments import MASTER
from harness.errors import DataError
from harness.io.atomic import write_json


class Tied(nn.Module):
    """A head that shares its weight with the embeddings, and what is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embeddings.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def masters(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embeddings.weight": (7, 4), "head.bias": (7,)}
    return {name: torch.randn(shape, generator=generator) * 10.0**seed for name, shape in shapes.items()}


def checkpoint(store: CheckpointStore, step: int, tensors: dict[str, Tensor]) -> Checkpoint:
    directory, file = store.begin(step), "rank-00000-0000.safetensors"
    save_file({name: tensor.flatten() for name, tensor in tensors.items()}, directory / file)
    common = {"kind": MASTER, "start": 0, "file": file, "updates": step}
    write_json(directory / "rank-00000.json", [
        {**common, "name": name, "key": name, "shape": list(tensor.shape), "numel": tensor.numel()}
        for name, tensor in tensors.items()
    ])  # fmt: skip
    return store.commit(step, [record_file(path) for path in directory.iterdir()], {})


def test_parameters_become_the_mean_in_float64(tmp_path: Path) -> None:
    store, model = CheckpointStore(tmp_path), Tied()
    frozen = model.frozen.weight.clone()
    seeds = (1, 4, 6)
    overwrite_parameters(model, [checkpoint(store, seed, masters(seed)) for seed in seeds])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mean = torch.stack([masters(seed)[name].double() for seed in seeds]).mean(dim=0)
            assert torch.equal(parameter, mean.float()), name
    assert model.head.weight is model.embeddings.weight
    assert torch.equal(model.frozen.weight, frozen)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"head.bias": torch.ones(1)}, "head.bias"),  # would be broadcast
        ({"embeddings.weight": torch.ones(4, 7)}, "embeddings.weight"),
        ({"other": torch.ones(2)}, "other"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(changes: dict[str, Tensor], name: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    chosen = [checkpoint(store, 1, masters(1)), checkpoint(store, 2, masters(2) | changes)]
    with pytest.raises(DataError, match=f"1 parameters differ between model and checkpoint: {name}") as caught:
        overwrite_parameters(Tied(), chosen)
    assert "step-00000002" in str(caught.value.where)
