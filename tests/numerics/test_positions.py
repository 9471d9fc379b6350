"""Decoders with a table of positions: how long it is, and that outputs end where it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from harness.config.schema import AdapterConfig
from harness.decoding.beam import BeamSettings, decode
from harness.decoding.decode import Hypothesis
from harness.errors import DataError
from harness.models.adapters import add_adapter
from harness.plan.parameters import position_limit

POSITIONS, VOCABULARY, EOS, PAD = 24, 40, 2, 1
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
BART: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": GPT | {"rotary_dim": 8},
    "codegen": GPT | {"rotary_dim": 8, "n_head": 4},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_position_embeddings": POSITIONS,
        "attention_types": [[["global"], 1]],
    },
    "opt": BART | {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "biogpt": BART | {"intermediate_size": 32},
}  # fmt: skip


def make_model(family: str) -> Any:
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**TABLES[family], **ids)).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", TABLES)
def test_a_table_is_as_long_as_it_says(family: str) -> None:
    model = make_model(family)
    assert position_limit(model.config.to_dict()) == POSITIONS
    model(input_ids=torch.full((1, POSITIONS), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, POSITIONS + 1), 7))


def decoded(model: Any, sizes: list[int], beam_size: int) -> tuple[list[list[int]], list[Hypothesis]]:
    prompts = torch.randint(5, VOCABULARY, (len(sizes), POSITIONS), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [prompt[:size] for prompt, size in zip(prompts, sizes, strict=True)]

    def collate(rows: list[int]) -> dict[str, Any]:
        longest = max(sizes[row] for row in rows)
        padding = [longest - sizes[row] for row in rows]
        ids = [[PAD] * num + prompts[row] for row, num in zip(rows, padding, strict=True)]
        mask = [[0] * num + [1] * sizes[row] for row, num in zip(rows, padding, strict=True)]
        return {"input_ids_BS": torch.tensor(ids), "attention_mask_BS": torch.tensor(mask), "pad": PAD, "ends": [EOS]}

    found = decode(model, sizes, collate, settings=BeamSettings(beam_size, 1.0, max_length=40), max_tokens=1000)
    assert found is not None
    return prompts, [found[row][0] for row in range(len(sizes))]


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt"])
def test_an_output_ends_where_the_table_does(family: str, beam_size: int) -> None:
    model, sizes = make_model(family), [3, POSITIONS - 1, 15, POSITIONS - 4]
    prompts, found = decoded(model, sizes, beam_size)
    for prompt, one in zip(prompts, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            num_beams=beam_size, max_new_tokens=POSITIONS - len(prompt), suppress_tokens=[PAD],
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert one.token_ids == [token for token in expected if token not in (EOS, PAD)]
        assert one.is_at_limit == (len(expected) - expected.count(PAD) == POSITIONS - len(prompt))
    assert sum(one.is_at_limit for one in found) > 1


def test_virtual_tokens_take_places_in_the_table() -> None:
    adapter = AdapterConfig(method="prompt_tuning", num_virtual_tokens=5)
    model = add_adapter(make_model("gpt2"), adapter, task="causal_lm", total_steps=1, seed=1).eval()
    sizes = [3, 12, POSITIONS - 6]
    _, found = decoded(model, sizes, 2)
    lengths = [(size, len(one.token_ids)) for size, one in zip(sizes, found, strict=True)]
    assert all(size + length <= POSITIONS - 5 for size, length in lengths)
    assert (POSITIONS - 6, 1) in lengths


def test_a_prompt_that_fills_the_table_is_refused() -> None:
    with pytest.raises(DataError, match="prompt of 24 tokens leaves no room for an answer: the model has 24 positions"):
        decoded(make_model("gpt2"), [3, POSITIONS], 2)
