"""Constraints, sampling and decoder-only models against Hugging Face `generate` and its logits processors.

Shapes: B rows, S prompt positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from harness.config.schema import AdapterConfig
from harness.decoding.beam import BeamSettings, decode
from harness.decoding.constraints import Constraints
from harness.decoding.sampling import Sampling, uniform
from harness.errors import ConfigError
from harness.models.adapters import add_adapter
from tests.lockstep import decode_in_step
from tests.numerics.test_beam import EOS, FAMILIES, PAD, PREFIXES, VOCABULARY, content, decode_rows_of, make_batch
from tests.numerics.test_beam import make_model as make_translator
from tests.searches import beam_search

CONSTRAINTS = {
    "min_length": (Constraints(min_length=7), {"min_new_tokens": 7}),
    "no_repeat": (Constraints(no_repeat_ngram=2), {"no_repeat_ngram_size": 2}),
    "repetition": (Constraints(repetition_penalty=1.4), {"repetition_penalty": 1.4}),
    "bad_words": (Constraints(bad_words=((5,), (29, 37), (4, 4, 8))), {"bad_words_ids": [[5], [29, 37], [4, 4, 8]]}),
    "all": (
        Constraints(4, 3, 0.8, ((7,), (9, 9))),
        {"min_new_tokens": 4, "no_repeat_ngram_size": 3, "repetition_penalty": 0.8, "bad_words_ids": [[7], [9, 9]]},
    ),
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=5)),
}


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_constraints_are_those_of_generate(family: str, name: str, beam_size: int) -> None:
    model, batch = make_translator(family), make_batch(rows=8)
    start, forced = PREFIXES[family]
    constraints, options = CONSTRAINTS[name]
    settings = BeamSettings(beam_size, 1.0, max_length=15, constraints=constraints)
    model.generation_config.forced_eos_token_id = None
    expected = model.generate(
        batch[0], attention_mask=batch[1], num_beams=beam_size, decoder_start_token_id=start, max_new_tokens=15,
        forced_bos_token_id=forced, suppress_tokens=[PAD], return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    found = decode_rows_of(model, family, batch, settings, max_tokens=100)
    outputs = [content(row, 1 if forced is None else 2) for row in expected.sequences.tolist()]
    assert [found[row][0].token_ids for row in range(8)] == outputs
    if beam_size > 1:
        scores = [found[row][0].score for row in range(8)]
        assert scores == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5)


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_at_the_length_limit_are_told(family: str, beam_size: int) -> None:
    model, batch = make_translator(family), make_batch(rows=16)
    start, forced = PREFIXES[family]
    model.generation_config.forced_eos_token_id = None
    expected = model.generate(
        batch[0], attention_mask=batch[1], num_beams=beam_size, decoder_start_token_id=start, max_new_tokens=9,
        forced_bos_token_id=forced, suppress_tokens=[PAD],
    )  # fmt: skip
    found = decode_rows_of(model, family, batch, BeamSettings(beam_size, 1.0, max_length=9), max_tokens=100)
    lengths = (expected[:, 1:] != PAD).sum(dim=1)
    assert [found[row][0].is_at_limit for row in range(16)] == (lengths == 9).tolist()
    assert 0 < (lengths == 9).sum() < 16


@pytest.mark.parametrize("beam_size", [1, 4])
def test_an_output_that_may_not_end_is_cut_where_fairseq_would_force_it_to(beam_size: int) -> None:
    """mBART-50's decoder starts with </s>, which may then not come again."""
    model, batch = make_translator("mbart50"), make_batch(rows=4)
    constraints = Constraints(no_repeat_ngram=1)
    settings = BeamSettings(beam_size, 1.0, 8, num_hypotheses=beam_size, preset="fairseq", constraints=constraints)
    found = decode_rows_of(model, "mbart50", batch, settings, max_tokens=100)
    expected = decode_rows_of(model, "mbart50", batch, replace(settings, preset="hf"), max_tokens=100)
    assert found == expected
    assert all(len(one.token_ids) == 7 for row in range(4) for one in found[row])


def make_decoder(name: str) -> Any:
    torch.manual_seed(3)
    model = DECODERS[name]().eval()
    with torch.no_grad():
        for matrix in (weight for weight in model.parameters() if weight.ndim == 2):
            matrix.normal_(std=0.35)
        model.lm_head.weight.normal_(std=1.0)
    return model


def prompts(rows: int = 7) -> tuple[Tensor, Tensor]:
    """Ragged prompts, padded at their start."""
    ids_BS, mask_BS = make_batch(seed=2, rows=rows)
    return ids_BS.flip(1), mask_BS.flip(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_decodes_as_generate_does(family: str) -> None:
    """Equal logits are common in bfloat16, so a few rows may differ: at least four of five outputs are the same."""
    model, batch = make_translator(family).bfloat16(), make_batch(rows=30)
    start, forced = PREFIXES[family]
    model.generation_config.forced_eos_token_id = None
    expected = model.generate(
        batch[0], attention_mask=batch[1], num_beams=3, decoder_start_token_id=start, max_new_tokens=15,
        forced_bos_token_id=forced, suppress_tokens=[PAD],
    )  # fmt: skip
    found = decode_rows_of(model, family, batch, BeamSettings(3, 1.0, max_length=15), max_tokens=200)
    outputs = [content(row, 1 if forced is None else 2) for row in expected.tolist()]
    assert sum(found[row][0].token_ids == outputs[row] for row in range(30)) >= 24


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_goes_on_with_its_prompts_as_generate_does(name: str, beam_size: int) -> None:
    model, (ids_BS, mask_BS) = make_decoder(name), prompts()
    settings = BeamSettings(beam_size, 0.8, max_length=12, num_hypotheses=beam_size)
    expected = model.generate(
        ids_BS, attention_mask=mask_BS, num_beams=beam_size, length_penalty=0.8, max_new_tokens=12,
        num_return_sequences=beam_size, suppress_tokens=[PAD], return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    outputs = [content(row, ids_BS.shape[1]) for row in expected.sequences.tolist()]
    sizes = mask_BS.sum(dim=1).tolist()

    def collate(rows: list[int]) -> dict[str, Any]:
        longest = max(sizes[row] for row in rows)
        return {"input_ids_BS": ids_BS[rows, -longest:], "attention_mask_BS": mask_BS[rows, -longest:]}

    together = beam_search(model, ids_BS, mask_BS, settings=settings, synced=False)
    in_turn = decode(model, sizes, collate, settings=settings, max_tokens=2 * 12 * beam_size)
    for found in (together, in_turn):
        assert found is not None
        flat = [one for row in range(len(sizes)) for one in found[row]]
        assert [one.token_ids for one in flat] == outputs
        if beam_size > 1:
            assert [one.score for one in flat] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_ranks_with_an_adapter_move_in_step(method: str) -> None:
    """Virtual tokens make a decoder read its prompts one by one."""
    (ids_BS, mask_BS), settings = prompts(9), BeamSettings(3, 1.0, max_length=10)
    adapter = AdapterConfig(method=method)
    model = add_adapter(make_decoder("llama"), adapter, task="causal_lm", total_steps=10, seed=1).eval()
    sizes = mask_BS.sum(dim=1).tolist()
    base = next(name for name, module in model.named_modules() if isinstance(module, LlamaModel))

    def decoded(model: Any, **options: Any) -> Any:
        def collate(rows: list[int]) -> dict[str, Any]:
            longest = max(sizes[row] for row in rows)
            parts = {"input_ids_BS": ids_BS[rows, -longest:], "attention_mask_BS": mask_BS[rows, -longest:]}
            return {**parts, "pad": PAD, "ends": [EOS]}

        return decode(model, sizes, collate, settings=settings, max_tokens=120, **options)

    alone = decoded(model)
    for hands in ([[0, 1, 2, 3, 4, 5, 6, 7], [8]], [[], [0, 1, 2]], [[3, 4, 5], [1, 2]]):
        calls, found = decode_in_step(model, [base], hands, decoded)
        assert calls[0] == calls[1]
        for hand, rows in zip(hands, found, strict=True):
            assert {row: one[0].token_ids for row, one in rows.items()} == {
                row: alone[row][0].token_ids for row in hand
            }


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_a_decoder_that_cannot_tell_beams_apart_is_refused(family: str) -> None:
    config: Any = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    if family == "gpt_neo":
        config = GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["local"], 1]]
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=f"{family} cannot be decoded"):
        beam_search(model, *prompts(), pad=PAD, ends=[EOS], settings=BeamSettings(2, 1.0, 5), synced=False)


@given(st.floats(0.3, 3.0), st.integers(0, 12), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_what_is_drawn_from_is_what_generate_draws_from(
    temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits_RV = 2 * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    expected = warpers(torch.zeros(3, 1, dtype=torch.long), logits_RV).softmax(-1)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).probabilities(logits_RV), expected)


def test_draws_have_their_probabilities() -> None:
    scores_RNV = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(10_000, 2, -1)
    drawn = Sampling(seed=5).draw(scores_RNV, torch.arange(10_000), torch.zeros(10_000, dtype=torch.long))
    shares = drawn.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012, rtol=0.0)  # 3.5 sigma
    numbers = torch.tensor([uniform(1, row, place) for row in range(100) for place in range(100)])
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert abs(float(numbers[1:].sub(0.5) @ numbers[:-1].sub(0.5)) / 10_000) < 0.003


@pytest.mark.parametrize(
    "constraints", [None, Constraints(no_repeat_ngram=4), Constraints(no_repeat_ngram=2, bad_words=((33, 9),))]
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_several_samples_are_chains_of_their_own(family: str, constraints: Constraints | None) -> None:
    """Each draw follows from the plain model's probabilities of what it has drawn before, and its own number."""
    model, batch = make_translator(family), make_batch(rows=4)
    start, forced = PREFIXES[family]
    sampling = Sampling(1.2, top_p=0.9, seed=3)
    settings = BeamSettings(1, 1.0, max_length=10, num_hypotheses=3, sampling=sampling, constraints=constraints)
    found = decode_rows_of(model, family, batch, settings, max_tokens=60, first_row=7)
    processors = LogitsProcessorList()
    if constraints:
        processors += [NoRepeatNGramLogitsProcessor(constraints.no_repeat_ngram)]
        processors += [NoBadWordsLogitsProcessor([list(one)]) for one in constraints.bad_words]
    for row, sample in itertools.product(range(4), range(3)):
        source = {"input_ids": batch[0][row : row + 1], "attention_mask": batch[1][row : row + 1]}
        tokens, log_p = [] if forced is None else [forced], 0.0
        while len(tokens) < 10 and EOS not in tokens:
            before = torch.tensor([[start, *tokens]])
            logits_1V = model(**source, decoder_input_ids=before).logits[:, -1]
            log_p_V = logits_1V[0].log_softmax(-1)
            logits_1V = processors(before, logits_1V)
            logits_1V[:, PAD] = -torch.inf
            reached_V = Sampling(1.2, top_p=0.9).probabilities(logits_1V)[0].double().cumsum(0)
            number = uniform(3, 7 + row, sample, len(tokens)) * float(reached_V[-1])
            tokens.append(int((reached_V <= number).sum()))
            log_p += float(log_p_V[tokens[-1]])
        assert found[row][sample].token_ids == content(tokens, 0 if forced is None else 1)
        assert found[row][sample].score == pytest.approx(log_p / len(tokens), rel=1e-5)
    assert len({tuple(one.token_ids) for best in found.values() for one in best}) > 6


@pytest.mark.parametrize("beam_size", [1, 3])
def test_the_shortest_length_follows_from_the_own_source(beam_size: int) -> None:
    model, batch = make_translator("m2m_100"), make_batch(rows=12)
    model.lm_head.weight.data[EOS] *= 3.0
    settings = BeamSettings(beam_size, 1.0, max_length=30, max_length_ratio=0.5)
    free = decode_rows_of(model, "m2m_100", batch, settings, max_tokens=90)
    constrained = replace(settings, constraints=Constraints(min_length=2, min_length_ratio=1.5))
    found = decode_rows_of(model, "m2m_100", batch, constrained, max_tokens=90)
    for row, size in enumerate(batch[1].sum(dim=1).tolist()):
        shortest = min(
            max(2, int(1.5 * size)), int(0.5 * size) + 10 - 1
        )  # and at least one token less than the longest
        assert len(found[row][0].token_ids) + 1 >= shortest  # and the forced tag
    assert any(len(free[row][0].token_ids) < len(found[row][0].token_ids) for row in range(12))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_depends_on_its_row_and_seed_alone(family: str) -> None:
    model, batch = make_translator(family), make_batch(rows=9)
    settings = BeamSettings(1, 0.0, max_length=12, sampling=Sampling(1.5, seed=3))
    found = decode_rows_of(model, family, batch, settings, max_tokens=10**6)
    for max_tokens, rows in [(0, range(9)), (25, [8, 2, 5])]:
        again = decode_rows_of(model, family, batch, settings, max_tokens=max_tokens, rows=rows)
        assert [again[row][0].token_ids for row in rows] == [found[row][0].token_ids for row in rows]
    other = BeamSettings(1, 0.0, max_length=12, sampling=Sampling(1.5, seed=4))
    changed = decode_rows_of(model, family, batch, other, max_tokens=10**6)
    assert [changed[row][0].token_ids for row in range(9)] != [found[row][0].token_ids for row in range(9)]


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_without_a_penalty_are_one_search_each(family: str) -> None:
    model, batch = make_translator(family), make_batch(rows=5)
    settings = BeamSettings(2, 1.0, max_length=14, num_hypotheses=2)
    alone = decode_rows_of(model, family, batch, settings, max_tokens=10**6)
    three = replace(settings, beam_size=6, beam_groups=3, num_hypotheses=6)
    same = decode_rows_of(model, family, batch, three, max_tokens=200)
    other = decode_rows_of(model, family, batch, replace(three, diversity_penalty=2.0), max_tokens=200)
    for row in range(5):
        assert [one.token_ids for one in same[row][::3]] == [one.token_ids for one in alone[row]]
        assert [one.score for one in same[row][::3]] == pytest.approx([one.score for one in alone[row]], rel=1e-5)
    assert all(len({tuple(one.token_ids) for one in same[row]}) == 2 for row in range(5))
    assert all(len({tuple(one.token_ids) for one in other[row]}) > 3 for row in range(5))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_phrases_are_met_and_scores_are_those_of_the_outputs(family: str) -> None:
    model, batch = make_translator(family), make_batch(rows=6)
    start, forced = PREFIXES[family]
    settings = BeamSettings(5, 1.0, max_length=16, num_hypotheses=3)
    phrases = {1: [[[5, 6, 7]]], 4: [[[9]], [[22, 23], [24]]]}
    free = decode_rows_of(model, family, batch, settings, max_tokens=150)
    found = decode_rows_of(model, family, batch, settings, max_tokens=150, phrases=phrases)
    for row in (0, 2, 3, 5):
        assert [one.token_ids for one in found[row]] == [one.token_ids for one in free[row]]
        assert [one.score for one in found[row]] == pytest.approx([one.score for one in free[row]], rel=1e-5)
    for row, wanted in phrases.items():
        source = {"input_ids": batch[0][row : row + 1], "attention_mask": batch[1][row : row + 1]}
        assert [one.score for one in found[row]] == sorted((one.score for one in found[row]), reverse=True)
        for output, score, *_ in found[row]:
            written = f" {' '.join(map(str, output))} "
            assert all(any(f" {' '.join(map(str, way))} " in written for way in ways) for ways in wanted)
            tokens = [*([] if forced is None else [forced]), *output, EOS][:16]
            decoder = torch.tensor([[start, *tokens[:-1]]])
            log_p_TV = model(**source, decoder_input_ids=decoder).logits[0].log_softmax(-1)
            own_T = log_p_TV.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0]
            total = float(own_T[forced is not None :].sum())
            assert score == pytest.approx(total / len(tokens), rel=1e-5)
