"""Expected utilities against plain loops over sacreBLEU's sentence scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from harness.scoring.minimum_risk import rank_by_risk

WORDS = st.sampled_from(["a", "the", "cat", "sat", "on", "mat", ".", "Füße", "I'm", "再见"])
SENTENCES = st.lists(WORDS, max_size=9).map(" ".join)


@pytest.mark.parametrize("utility", ["chrf", "bleu"])
@given(samples=st.lists(SENTENCES, min_size=1, max_size=7))
def test_is_the_mean_of_the_sentence_scores_against_all_samples(utility: str, samples: list[str]) -> None:
    metric = CHRF() if utility == "chrf" else BLEU(effective_order=True)
    expected = {
        one: sum(metric.sentence_score(one, [other]).score for other in samples) / len(samples) for one in samples
    }
    found = rank_by_risk(samples, utility)  # type: ignore[arg-type]
    assert dict(found) == pytest.approx(expected, abs=1e-9)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_samples_that_come_often_weigh_more() -> None:
    often, once = "the cat sat on the mat", "a dog ran"
    assert rank_by_risk([once, often, often], "chrf")[0][0] == often
    assert [text for text, _ in rank_by_risk(["b", "a"], "bleu")] == ["b", "a"], "of equals the one drawn first"


def test_chinese_is_compared_by_character() -> None:
    samples = ["我喜欢喝茶", "我喜欢喝水", "他喜欢喝茶"]
    by_character, by_word = (rank_by_risk(samples, "bleu", language)[0][1] for language in ("zh_CN", None))
    assert by_character > by_word + 10
