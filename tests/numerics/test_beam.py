"""Beam search against Hugging Face `generate` called directly, and the cutting of rows into decoding batches.

Shapes: B rows, S source positions.
"""

import copy
import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from harness.decoding.beam import BeamSettings, decode
from harness.decoding.decode import Hypothesis
from harness.evaluation.forward import deal
from tests.lockstep import decode_in_step
from tests.searches import beam_search

VOCABULARY, ROWS = 40, 6
PAD, EOS = 1, 2
LANGUAGE = 30
BART_SHAPE = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    "init_std": 0.3, "tie_word_embeddings": False, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS,
}  # fmt: skip
T5_SHAPE = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "initializer_factor": 1.0, "tie_word_embeddings": False, "pad_token_id": PAD, "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
}  # fmt: skip
FAMILIES = {
    "mbart50": lambda: MBartForConditionalGeneration(MBartConfig(**BART_SHAPE)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART_SHAPE)),
    "m2m_100": lambda: M2M100ForConditionalGeneration(M2M100Config(**BART_SHAPE)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART_SHAPE, decoder_start_token_id=PAD)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SHAPE)),
}
# decoder start, forced first token
PREFIXES = {
    "mbart50": (EOS, LANGUAGE),
    "mbart": (LANGUAGE, None),
    "m2m_100": (EOS, LANGUAGE),
    "marian": (PAD, None),
    "t5": (PAD, None),
}
SEEDS = {"mbart50": 1, "mbart": 0, "m2m_100": 0, "marian": 2, "t5": 0}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)


def make_model(family: str):
    """Random weights, spread so that outputs vary with the source and end in different places."""
    torch.manual_seed(SEEDS[family])
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for matrix in (weight for weight in model.parameters() if weight.ndim == 2):
            matrix.normal_(std=0.35)
        model.lm_head.weight.normal_(std=0.5)
        model.lm_head.weight[EOS] *= 3.0
    return model


def make_batch(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (rows,), generator=generator)
    input_ids_BS = torch.randint(3, LANGUAGE, (rows, int(lengths.max())), generator=generator)
    attention_mask_BS = (torch.arange(input_ids_BS.shape[1]) < lengths[:, None]).long()
    return input_ids_BS.masked_fill(attention_mask_BS == 0, PAD), attention_mask_BS


def search(model, family, batch, settings, synced=False) -> list[list[Hypothesis]]:
    start, forced = PREFIXES[family]
    starts_B = torch.full((len(batch[0]),), start)
    return beam_search(model, *batch, decoder_start_B=starts_B, forced_first=forced, settings=settings, synced=synced)


def decode_rows_of(model, family, batch, settings, **options):
    """Each row read by itself, as an evaluation reads its rows."""
    start, forced = PREFIXES[family]
    sizes = batch[1].sum(dim=1).tolist()

    def collate(rows: list[int]) -> dict:
        longest = max(sizes[row] for row in rows)
        return {
            "input_ids_BS": batch[0][rows, :longest], "attention_mask_BS": batch[1][rows, :longest],
            "decoder_start_B": torch.full((len(rows),), start), "forced_first": forced and [forced] * len(rows),
        }  # fmt: skip

    return decode(model, sizes, collate, settings=settings, **options)


def canonical(model, family, batch, settings):
    """What a user of transformers would write (mBART's configuration would add a forced last </s>)."""
    model.generation_config.forced_eos_token_id = None
    start, forced = PREFIXES[family]
    return model.generate(
        input_ids=batch[0], attention_mask=batch[1], num_beams=settings.beam_size, decoder_start_token_id=start,
        forced_bos_token_id=forced, length_penalty=settings.length_penalty, max_new_tokens=settings.max_length,
        num_return_sequences=settings.num_hypotheses, suppress_tokens=[PAD], return_dict_in_generate=True,
        output_scores=True, early_stopping=settings.early_stopping,
    )  # fmt: skip


def content(tokens: list[int], num_prefix: int) -> list[int]:
    tokens = tokens[num_prefix:]
    return tokens[: min((tokens.index(end) for end in (EOS, PAD) if end in tokens), default=len(tokens))]


@pytest.mark.parametrize("length_penalty", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(("beam_size", "num_hypotheses"), [(4, 3), (5, 1), (2, 1)])
def test_equals_generate_with_canonical_arguments(model, family, beam_size, num_hypotheses, length_penalty):
    settings = BeamSettings(beam_size, length_penalty, max_length=20, num_hypotheses=num_hypotheses)
    batch = make_batch()
    expected = canonical(model, family, batch, settings)
    found = search(model, family, batch, settings)
    assert [len(row) for row in found] == [num_hypotheses] * ROWS
    flat = [hypothesis for row in found for hypothesis in row]
    num_prefix = 1 if PREFIXES[family][1] is None else 2
    assert [one.token_ids for one in flat] == [content(row, num_prefix) for row in expected.sequences.tolist()]
    torch.testing.assert_close(torch.tensor([one.score for one in flat]), expected.sequences_scores)


@pytest.mark.parametrize("length_penalty", [1.0, 0.6, 0.0, -1.0])
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_rows_that_come_and_go_get_what_generate_gives_each_batch(model, family, beam_size, length_penalty):
    """Twelve ragged rows, room for about three of them at a time."""
    settings = BeamSettings(beam_size, length_penalty, max_length=20, num_hypotheses=beam_size)
    batch = make_batch(rows=12)
    expected = canonical(model, family, batch, settings)
    found = decode_rows_of(model, family, batch, settings, max_tokens=3 * 8 * beam_size)
    num_prefix = 1 if PREFIXES[family][1] is None else 2
    for row in range(12):
        mine = slice(row * beam_size, (row + 1) * beam_size)
        outputs = [content(tokens, num_prefix) for tokens in expected.sequences[mine].tolist()]
        assert [one.token_ids for one in found[row]] == outputs
        if beam_size > 1:
            scores = [one.score for one in found[row]]
            assert scores == pytest.approx(expected.sequences_scores[mine].tolist(), rel=1e-5)


@pytest.mark.parametrize("length_penalty", [1.0, -0.5])
@pytest.mark.parametrize("early_stopping", [True, "never"])
def test_early_stopping_is_that_of_generate(model, family, early_stopping, length_penalty):
    settings = BeamSettings(4, length_penalty, max_length=20, early_stopping=early_stopping)
    batch = make_batch(rows=12)
    expected = canonical(model, family, batch, settings)
    num_prefix = 1 if PREFIXES[family][1] is None else 2
    found = [row[0] for row in search(model, family, batch, settings)]
    assert [one.token_ids for one in found] == [content(tokens, num_prefix) for tokens in expected.sequences.tolist()]
    assert [one.score for one in found] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5)


@pytest.mark.parametrize("preset", ["fairseq", "gnmt", "marian", "opennmt", "ctranslate2"])
def test_every_preset_decodes_a_model_and_gives_its_own_scores(preset):
    model, batch = make_model("mbart"), make_batch(rows=12)
    settings = BeamSettings(4, 1.0, max_length=20, num_hypotheses=2, preset=preset)
    found = decode_rows_of(model, "mbart", batch, settings, max_tokens=100)
    for row in range(12):
        for one in found[row]:
            ended = len(one.token_ids) < 20
            outputs = torch.tensor([one.token_ids + [EOS] * ended])
            inputs = torch.cat([torch.tensor([[LANGUAGE]]), outputs[:, :-1]], dim=1)
            with torch.no_grad():
                logits = model(batch[0][row : row + 1], batch[1][row : row + 1], decoder_input_ids=inputs).logits
            log_p = logits.log_softmax(-1).gather(2, outputs.unsqueeze(2)).sum()
            divisor = settings.convention.divisor(torch.tensor(outputs.shape[1]), 1.0)
            assert one.score == pytest.approx(float(log_p / divisor), rel=1e-5)
        assert found[row][0].score >= found[row][1].score


@pytest.mark.parametrize("beam_size", [1, 4])
def test_no_budget_no_order_and_no_neighbour_changes_a_row(model, family, beam_size):
    settings = BeamSettings(beam_size, 1.0, max_length=20)
    batch = make_batch(rows=12)
    alone = [search(model, family, (batch[0][i : i + 1], batch[1][i : i + 1]), settings)[0][0] for i in range(12)]
    for max_tokens, rows in [(0, range(12)), (150, range(12)), (400, [7, 3, 11, 0]), (10**6, range(11, -1, -1))]:
        found = decode_rows_of(model, family, batch, settings, max_tokens=max_tokens, rows=rows)
        assert sorted(found) == sorted(rows)
        for row in rows:
            assert found[row][0].token_ids == alone[row].token_ids
            assert found[row][0].score == pytest.approx(alone[row].score, abs=1e-5)


def test_greedy_equals_generate_and_the_sum_of_its_log_probabilities(model, family):
    settings = BeamSettings(1, 0.7, max_length=20)
    batch = make_batch(seed=5)
    expected = canonical(model, family, batch, settings)
    forced = PREFIXES[family][1]
    decoder_BT = expected.sequences
    with torch.no_grad():
        logits = model(input_ids=batch[0], attention_mask=batch[1], decoder_input_ids=decoder_BT[:, :-1]).logits
    log_p = logits.log_softmax(-1).gather(2, decoder_BT[:, 1:, None]).squeeze(2)
    if forced is not None:
        log_p[:, 0] = 0.0
    for row, [hypothesis] in enumerate(search(model, family, batch, settings)):
        tokens = decoder_BT[row, 1:].tolist()
        length = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        assert hypothesis.token_ids == content(decoder_BT[row].tolist(), 1 if forced is None else 2)
        assert hypothesis.score == pytest.approx(float(log_p[row, :length].sum()) / length**0.7, rel=1e-4, abs=1e-5)


def test_outputs_vary_and_end_in_different_places(model, family):
    """The comparisons above are worth something only if hypotheses end in different places."""
    found = search(model, family, make_batch(), BeamSettings(4, 1.0, max_length=20))
    assert len({len(row[0].token_ids) for row in found}) > 1
    assert len({tuple(row[0].token_ids) for row in found}) >= 4


def test_a_stale_generation_config_changes_nothing_and_is_put_back(model, family):
    settings = BeamSettings(3, 1.0, max_length=12)
    clean = search(model, family, make_batch(), settings)
    for key, value in {
        "num_beams": 7, "max_length": 4, "min_length": 11, "forced_bos_token_id": 9, "forced_eos_token_id": 11,
        "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "early_stopping": True, "do_sample": True,
        "bad_words_ids": [[5], [6], [7]], "temperature": 0.1, "decoder_start_token_id": 8, "length_penalty": -3.0,
        "num_return_sequences": 2, "use_cache": False, "max_new_tokens": 2, "return_dict_in_generate": True,
    }.items():  # fmt: skip
        setattr(model.generation_config, key, value)
    stale = copy.deepcopy(model.generation_config)
    assert search(model, family, make_batch(), settings) == clean
    assert model.generation_config == stale


def test_training_mode_is_put_back_and_dropout_is_off(family):
    model = make_model(family).train()
    settings = BeamSettings(3, 1.0, max_length=12)
    assert search(model, family, make_batch(), settings) == search(model, family, make_batch(), settings)
    assert all(module.training for module in model.modules())


def test_rows_may_start_with_different_languages(model, family):
    settings = BeamSettings(4, 1.0, max_length=12)
    input_ids_BS, attention_mask_BS = make_batch(rows=4)
    tags = [30, 31, 32, 31]
    starts, forced = (tags, None) if PREFIXES[family][1] is None else ([EOS] * 4, tags)
    together = beam_search(
        model, input_ids_BS, attention_mask_BS, decoder_start_B=torch.tensor(starts), forced_first=forced,
        settings=settings, synced=False,
    )  # fmt: skip
    for row, tag in enumerate(tags):
        [alone] = beam_search(
            model, input_ids_BS[row : row + 1], attention_mask_BS[row : row + 1], settings=settings, synced=False,
            decoder_start_B=torch.tensor(starts[row : row + 1]), forced_first=None if forced is None else tag,
        )  # fmt: skip
        assert together[row][0].token_ids == alone[0].token_ids
        assert together[row][0].score == pytest.approx(alone[0].score, rel=1e-5)


def test_outputs_do_not_depend_on_the_neighbours(model, family):
    settings = BeamSettings(4, 1.0, max_length=16)
    input_ids_BS, attention_mask_BS = make_batch(rows=9)
    whole = search(model, family, (input_ids_BS, attention_mask_BS), settings)
    for order in (torch.arange(9).flip(0), torch.tensor([4, 0, 8, 2]), torch.tensor([7])):
        width = int(attention_mask_BS[order].sum(1).max())
        batch = input_ids_BS[order, :width], attention_mask_BS[order, :width]
        for row, [hypothesis] in zip(order.tolist(), search(model, family, batch, settings), strict=True):
            assert hypothesis.token_ids == whole[row][0].token_ids
            assert hypothesis.score == pytest.approx(whole[row][0].score, rel=1e-5)


def test_more_hypotheses_than_beams_is_a_programming_error():
    with pytest.raises(ValueError, match="num_hypotheses=3 must lie between 1 and 2 outputs"):
        BeamSettings(2, 1.0, 10, num_hypotheses=3)


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3), max_size=40), st.integers(1, 9))
def test_dealing_gives_each_batch_to_one_rank_and_all_ranks_equally_many(batches, world_size):
    hands = [deal(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(hand) for hand in hands}) == 1
    dealt = [turn.rows for turns in zip(*hands, strict=True) for turn in turns if turn.counts]
    assert dealt == batches
    assert all(turn.rows for hand in hands for turn in hand)


def assert_moves_in_step(model, batch, hands, settings, max_tokens):
    """Ranks with these hands of rows run the same modules in the same order, and find what one process finds."""
    calls, found = decode_in_step(
        model, ["model.encoder", "model.decoder"], hands,
        lambda model, **options: decode_rows_of(model, "mbart", batch, settings, max_tokens=max_tokens, **options),
    )  # fmt: skip
    assert all(one == calls[0] for one in calls)
    assert set(calls[0]) == {"model.encoder", "model.decoder"}
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in hands]
    alone = search(model, "mbart", batch, settings)
    assert all(one[0].token_ids == alone[row][0].token_ids for rows in found for row, one in rows.items())


@pytest.mark.parametrize(
    "hands", [[list(range(12)), []], [[0], list(range(1, 12))], [[3, 4], [5]], [[1, 2, 3], [4], []], [[], [7]]]
)
def test_ranks_that_share_parameters_move_in_step_whatever_their_rows(hands):
    assert_moves_in_step(make_model("mbart"), make_batch(rows=12), hands, BeamSettings(3, 1.0, max_length=12), 80)


def test_two_hundred_random_patterns_of_lengths_in_step():
    """On two to four ranks, rows and room for them at random; outputs of 1 to 12 tokens."""
    model, draw = make_model("mbart"), random.Random(0)
    for seed in range(200):
        num_ranks, num_rows = draw.randint(2, 4), draw.randint(1, 8)
        ranks = [draw.randrange(num_ranks) for _ in range(num_rows)]
        hands = [[row for row in range(num_rows) if ranks[row] == rank] for rank in range(num_ranks)]
        settings = BeamSettings(draw.choice([1, 2, 3]), 1.0, draw.randint(1, 12), draw.choice([None, 0.2]))
        assert_moves_in_step(model, make_batch(seed, num_rows), hands, settings, draw.choice([0, 30, 80, 300]))


def test_a_wish_to_stop_ends_the_search():
    model, batch = make_model("mbart"), make_batch(rows=12)
    settings = BeamSettings(3, 1.0, max_length=12)
    assert decode_rows_of(model, "mbart", batch, settings, max_tokens=80, stop_wanted=lambda: True) is None


SOURCE_SIZES = make_batch(rows=11)[1].sum(1).tolist()
ZERO3_SETTINGS = BeamSettings(4, 1.0, max_length=20)


def rows_of(rows: list[int]) -> tuple[Tensor, Tensor]:
    input_ids_BS, attention_mask_BS = make_batch(rows=11)
    width = max(SOURCE_SIZES[row] for row in rows)
    return input_ids_BS[rows, :width], attention_mask_BS[rows, :width]


def zero3_rank(rank: int, world_size: int, directory: str) -> None:
    """Decode batches of unequal lengths in a ZeRO-3 engine and write this rank's hypotheses."""
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    model = make_model("mbart")
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), dist_init_required=False,
        config={"train_batch_size": 2, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True},
    )  # fmt: skip
    found = {}
    for turn in deal([[0, 1, 2], [3, 4], [5, 6, 7, 8, 9], [10]], rank, world_size):
        outputs = search(engine.module, "mbart", rows_of(turn.rows), ZERO3_SETTINGS, synced=True)
        if turn.counts:
            found |= {row: one.token_ids for row, [one] in zip(turn.rows, outputs, strict=True)}
    Path(directory, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_ranks_of_zero3_find_what_one_process_finds(tmp_path):
    torch.multiprocessing.spawn(zero3_rank, args=(2, str(tmp_path)), nprocs=2)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert not set(by_rank[0]) & set(by_rank[1])
    whole = search(make_model("mbart"), "mbart", make_batch(rows=11), ZERO3_SETTINGS)
    assert by_rank[0] | by_rank[1] == {str(row): one.token_ids for row, [one] in enumerate(whole)}


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_row_ends_at_a_multiple_of_its_own_source(beam_size):
    model = make_model("mbart")
    model.final_logits_bias[0, EOS] = -100.0  # never ends by itself
    batch = make_batch()
    settings = BeamSettings(beam_size, 1.0, max_length=40, max_length_ratio=0.5)
    found = search(model, "mbart", batch, settings)
    limits = [int(0.5 * length) + 10 for length in batch[1].sum(dim=1).tolist()]
    assert len(set(limits)) > 1
    assert [len(row[0].token_ids) for row in found] == [limit - 1 for limit in limits]  # </s> counts
    alone = [search(model, "mbart", [part[i : i + 1] for part in batch], settings)[0][0] for i in range(ROWS)]
    assert [row[0].token_ids for row in found] == [one.token_ids for one in alone]
    assert [row[0].score for row in found] == pytest.approx([one.score for one in alone], abs=1e-5)
