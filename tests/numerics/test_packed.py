"""Linear layers with packed weights against plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.models.packed import packed


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (7, 5, 24), (300, 24)])
def test_products_are_those_of_plain_layers(shape, has_bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 1000, bias=has_bias)
    inputs = torch.randn(shape)
    with torch.no_grad():
        expected = layer(inputs)
        with packed(nn.Sequential(layer)):
            assert "forward" in vars(layer)
            found = layer(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_are_put_back_after_an_error_and_see_new_weights_the_next_time():
    layer, inputs = nn.Linear(3, 4), torch.ones(2, 3)
    with pytest.raises(KeyError), packed(layer):
        raise KeyError
    assert "forward" not in vars(layer)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
        with packed(layer):
            assert layer(inputs).tolist() == [[7.0] * 4] * 2


def test_other_types_partitioned_weights_and_replaced_layers_are_left_alone():
    narrow, wide, partitioned, replaced = (nn.Linear(3, 4) for _ in range(4))
    narrow.bfloat16()
    wide.double()
    partitioned.weight.data = torch.empty(0)
    forward = replaced.forward = lambda inputs: inputs
    model = nn.ModuleList([narrow, wide, partitioned, replaced])
    with packed(model):
        assert not any("forward" in vars(layer) for layer in (narrow, wide, partitioned))
        assert replaced.forward is forward
    assert replaced.forward is forward
