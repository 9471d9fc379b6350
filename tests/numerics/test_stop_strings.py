"""Stop strings against transformers' StopStringCriteria in `generate`, greedily and with beams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config.schema import DataConfig, DataSource, LossConfig
from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, decode
from harness.tasks.causal_lm import CausalTask
from tests.pairs import PAIRS
from tests.tiny_llm import make_tiny_llm

STOPS = ("e", "n", "ch", "ü", " d", "(")
MAX_LENGTH = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model whose random answers are several tokens long, and its tokeniser."""
    directory = make_tiny_llm(tmp_path_factory.mktemp("stops") / "model", initializer_range=0.35)
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def generated(model: Any, ids: list[int], **options: Any) -> Any:
    mask = torch.ones(1, len(ids), dtype=torch.long)
    options = {"max_new_tokens": MAX_LENGTH, "do_sample": False} | options
    return model.generate(torch.tensor([ids]), attention_mask=mask, **options)


@torch.no_grad()
@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("stops", [STOPS[:1], STOPS[1:3], STOPS, ()], ids=["one", "two", "many", "across tokens"])
def test_outputs_end_where_those_of_generate_do(parts: tuple[Any, Any], stops: tuple[str, ...], beam_size: int) -> None:
    model, tokenizer = parts
    data = DataConfig(format="prompt", train=[DataSource(path="x")], max_length=200)
    task = CausalTask(tokenizer, data, LossConfig())
    prompts = task.encode_sources([Row("", source, "") for source, _ in PAIRS[:12]])
    if not stops:
        said = [generated(model, one.input_ids)[0, len(one.input_ids) :].tolist() for one in prompts]
        texts = (tokenizer.decode(ids[5:8]) for ids in said)
        stops = tuple(text[1:-1] for text in texts if text.isprintable() and len(text) > 4)
        assert len(stops) > 3
    task = replace(task, stop_strings=stops)

    def collate(rows: list[int]) -> dict[str, Any]:
        return task.collate_sources([(prompts[row].input_ids, prompts[row].labels, 0) for row in rows], CPU)

    settings = BeamSettings(beam_size, 1.0, MAX_LENGTH, num_hypotheses=beam_size)
    found = decode(model, [len(one.input_ids) for one in prompts], collate, settings=settings, max_tokens=600)
    assert found is not None
    num_stopped = 0
    for row, prompt in enumerate(prompts):
        options: dict[str, Any] = {"num_beams": beam_size, "num_return_sequences": beam_size, "length_penalty": 1.0}
        expected = generated(
            model, prompt.input_ids, stop_strings=list(stops), tokenizer=tokenizer,
            eos_token_id=task.collate_sources([([5], [5], 0)], CPU)["ends"], pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        for one, sequence in zip(found[row], expected.sequences[:, len(prompt.input_ids) :].tolist(), strict=True):
            content = [token for token in sequence if token not in ends]
            assert one.token_ids == content
            said = tokenizer.decode(content, skip_special_tokens=True)
            num_stopped += any(stop in said for stop in stops)
            for stop in stops:
                said = said.split(stop)[0]
            assert task.to_text(one.token_ids) == " ".join(said.split())
        if beam_size > 1:
            assert [one.score for one in found[row]] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)
    assert num_stopped > 3
