"""Texts that end outputs, on a toy model whose tokens are letters: against all sequences, and what small beams keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from harness.decoding.diverse import DiverseBeamSearch
from harness.decoding.lexical import ConstrainedBeamSearch
from harness.decoding.presets import HF, PRESETS, Preset
from harness.decoding.search import BeamSearch, Rule
from harness.models.stops import StopStrings
from tests.toy import END, LONGEST, VOCABULARY, Output, Toy, search
from tests.unit.test_lexical import has
from tests.unit.test_search import assert_same, beam_sizes, penalties, seeds

LETTERS = ".abcde"
ALL = (VOCABULARY - 1) ** (LONGEST - 1)  # beams for everything
stop_sets = st.lists(st.sampled_from(["a", "b", "ab", "bba", "cc", "dcd"]), min_size=1, max_size=3)


def stops_of(*strings: str) -> StopStrings:
    letters = Tokenizer(models.WordLevel({letter: token for token, letter in enumerate(LETTERS)}, unk_token="."))
    letters.decoder = decoders.Fuse()
    return StopStrings(PreTrainedTokenizerFast(tokenizer_object=letters), strings)


def text_of(tokens: tuple[int, ...]) -> str:
    return "".join(LETTERS[token] for token in tokens)


def is_over(tokens: tuple[int, ...], stops: tuple[str, ...]) -> bool:
    return tokens[-1:] == (END,) or any(stop in text_of(tokens) for stop in stops)


def all_outputs(toy: Toy, stops: tuple[str, ...], length_penalty: float) -> list[Output]:
    """Every output that ends by its last token, by its text, or at LONGEST, best first."""

    def ended(total: float, tokens: tuple[int, ...]) -> Iterator[Output]:
        if is_over(tokens, stops) or len(tokens) == LONGEST:
            yield total / len(tokens) ** length_penalty, tokens
        else:
            for token, log_p in enumerate(toy.after(tokens).tolist()):
                yield from ended(total + log_p, (*tokens, token))

    return sorted(ended(0.0, ()), reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("strings", [("b",), ("ab", "c"), ("dad",)])
@pytest.mark.parametrize("wanted", [[], [[[5]]], [[[4, 5], [5, 4]]], [[[5]], [[4, 4]]]])
def test_with_beams_for_everything_the_best_of_all_sequences_are_found(
    strings: tuple[str, ...], wanted: list[list[list[int]]], length_penalty: float
) -> None:
    toy, options = Toy(3), ((END,), length_penalty, Preset("impossible"))
    rule = BeamSearch(*options, stops=stops_of(*strings))
    if wanted:
        rule = ConstrainedBeamSearch(*options, phrases={0: wanted}, stops=stops_of(*strings))
    [found] = search(toy, ALL, rule)
    expected = [
        one for one in all_outputs(toy, strings, length_penalty) if all(has(one[1], phrase) for phrase in wanted)
    ]
    assert_same(found[:10], expected[:10])
    assert any(is_over(tokens, strings) and tokens[-1] != END for _, tokens in found)


def rules(beams: int, length_penalty: float, stops: StopStrings) -> dict[str, Rule]:
    options = ((END,), length_penalty)
    return {
        **{name: BeamSearch(*options, preset, stops=stops) for name, preset in PRESETS.items()},
        "groups": DiverseBeamSearch(*options, stops=stops, groups=beams, diversity_penalty=0.3),
        "phrases": ConstrainedBeamSearch(*options, HF, phrases={0: [[[5]]]}, stops=stops),
    }


@pytest.mark.parametrize("name", rules(2, 1.0, stops_of("a")))
@given(seeds, beam_sizes, penalties, stop_sets)
def test_outputs_end_with_their_first_stop_string_and_go_on_without_one(
    name: str, seed: int, beams: int, length_penalty: float, strings: list[str]
) -> None:
    toy, stops = Toy(seed), tuple(strings)
    rule = rules(beams, length_penalty, stops_of(*stops))[name]
    [found] = search(toy, beams, rule)
    assert found
    for score, tokens in found:
        assert is_over(tokens, stops) or len(tokens) == LONGEST
        assert not any(is_over(tokens[:length], stops) for length in range(len(tokens)))
        if name != "groups":  # whose scores keep the penalties
            total = sum(float(toy.after(tokens[:place])[token]) for place, token in enumerate(tokens))
            divisor = float(rule.preset.divisor(torch.tensor(len(tokens)), length_penalty))
            assert score == pytest.approx(total / divisor, rel=1e-4, abs=1e-5)
        assert name != "phrases" or has(tokens, [[5]])


@given(seeds, beam_sizes, penalties, st.sampled_from(["marian", "opennmt"]))
def test_a_stop_string_of_one_token_is_one_more_token_that_ends(
    seed: int, beams: int, length_penalty: float, name: str
) -> None:
    """Of presets that look at as many candidates either way."""
    preset = PRESETS[name]
    [by_text] = search(Toy(seed), beams, BeamSearch((END,), length_penalty, preset, stops=stops_of("c")))
    [by_token] = search(Toy(seed), beams, BeamSearch((END, LETTERS.index("c")), length_penalty, preset))
    assert by_text == by_token
