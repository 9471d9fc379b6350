"""Suspicious outputs: made examples, and the real rows of examples/data with known mistakes put in."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from harness.reports.checks import find_suspects, repeats, similarity
from harness.reports.languages import Languages, script_shares, trigrams
from harness.reports.sentences import Sentences
from harness.tasks.task import Output

DATA = Path(__file__).parents[2] / "examples" / "data"
NUM_ROWS = 1200


def found(sources, references, outputs, pairs=()) -> dict[str, list[int]]:
    sentences = Sentences.of(sources, references, [[Output(text, 0.0)] for text in outputs], pairs)
    return {finding.name: finding.rows for finding in find_suspects(sentences)}


def shares(sources, references, outputs) -> dict[str, float]:
    return {name: len(rows) / len(sources) for name, rows in found(sources, references, outputs).items()}


@pytest.fixture(scope="module")
def real() -> tuple[list[str], list[str]]:
    """English sources and German references."""
    with gzip.open(DATA / "libreoffice-help.en-de.train.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t")[1:] for line in list(file)[1 : NUM_ROWS + 1]]
    return [source for source, _ in rows], [target for _, target in rows]


def test_real_references_are_hardly_suspected(real):
    sources, references = real
    assert set(shares(sources, references, references).values()) == {0.0}


def test_checks_without_a_reference_in_their_rule_seldom_suspect_people(real):
    """Of a thousand sentences that people wrote, each given as the output of another row's source."""
    sources, references = real
    other = references[1:] + references[:1]
    alarms = shares(sources, references, other)
    assert alarms["copy"] == 0.0
    assert alarms["wrong_language"] < 0.01
    assert sum(map(repeats, references)) / len(references) < 0.02


def test_sources_as_outputs_are_copies_in_the_wrong_language(real):
    sources, references = real
    alarms = shares(sources, references, sources)
    assert alarms["copy"] > 0.98
    assert alarms["wrong_language"] > 0.98


def test_english_that_is_no_copy_is_found_among_german(real):
    sources, references = real
    outputs = [sources[row - 1] if row % 20 == 0 else text for row, text in enumerate(references)]
    alarms = found(sources, references, outputs)
    wanted = set(range(0, len(sources), 20))
    assert len(alarms["copy"]) <= 1  # two neighbours are nearly the same
    assert set(alarms["wrong_language"]) <= wanted
    assert len(alarms["wrong_language"]) > 0.95 * len(wanted)


def test_real_outputs_cut_in_half_are_found(real):
    sources, references = real
    outputs = [text[: len(text) * 2 // 5] if row % 20 == 0 else text for row, text in enumerate(references)]
    alarms = found(sources, references, outputs)
    ended = {row for row in range(0, len(sources), 20) if references[row].endswith(".")}
    assert set(alarms["no_end"]) >= {row for row in ended if not outputs[row].endswith(".")}
    assert set(alarms["no_end"]) <= set(range(0, len(sources), 20))
    assert {row for row in range(0, len(sources), 20) if len(references[row]) > 60} <= set(alarms["too_short"])
    assert alarms["too_long"] == []


def test_real_outputs_in_a_loop_are_found(real):
    sources, references = real
    outputs = list(references)
    outputs[3] += " und dann" * 5
    outputs[5] += "9" * 12
    outputs[7] = outputs[7] + " Das ist so nicht gut." * 3
    assert found(sources, references, outputs)["repetition"] == [3, 5, 7]


@pytest.mark.parametrize(
    ("text", "is_loop"),
    [
        ("the cat the cat the cat the cat the cat", True),
        ("Zeilennnnnnnnnn", True),
        ("数据库的数据库的数据库的", True),
        ("The cat sat on the mat, the dog on the rug and the bird on the roof.", False),
        ("no, no, no", False),
        ("12,000,000", False),
        ("", False),
    ],
)
def test_loops(text, is_loop):
    assert repeats(text) is is_loop


def test_similarity_is_one_for_equal_and_zero_for_unlike_texts():
    assert similarity("Open the file.", " open the FILE. ") == 1.0
    assert similarity("abc", "xyz") == 0.0
    assert 0.8 < similarity("Open the file now.", "Open the files now.") < 1.0


def test_a_text_that_is_rightly_kept_is_no_copy():
    sources = ["LibreOffice Calc 7.4", "See https://example.org/a/long/path for a conversion table."]
    references = ["LibreOffice Calc 7.4", "Siehe https://example.org/a/long/path (englisch) als Tabelle."]
    assert found(sources, references, sources)["copy"] == [1]
    assert found(sources, references, references)["copy"] == []


def test_another_script_is_another_language_even_in_a_small_set():
    references = ["Откройте файл сейчас.", "Закройте все окна.", "LibreOffice Calc"]
    outputs = ["Open the file now.", "Закройте все окна.", "LibreOffice Calc"]
    assert found(["a", "b", "c"], references, outputs)["wrong_language"] == [0]


def test_chinese_is_not_japanese():
    references = ["ファイルを開いてください。", "すべてのウィンドウを閉じます。"]
    outputs = ["请现在打开这个文件夹吧。", "すべてのウィンドウを閉じる。"]
    assert found(["a", "b"], references, outputs)["wrong_language"] == [0]
    assert script_shares("ab 1 я!") == {"LATIN": pytest.approx(2 / 3), "CYRILLIC": pytest.approx(1 / 3)}


def test_names_in_katakana_are_japanese_at_any_width():
    references = [
        "ブラウザー Internet Explorer",
        *["文書を保存するにはボタンをクリックします。", "設定を選びます。"] * 5,
    ]
    for output in ("インターネットエクスプローラー", "ｲﾝﾀｰﾈｯﾄｴｸｽﾌﾟﾛｰﾗｰ"):
        assert found(list("abcdefghijk"), references, [output, *references[1:]])["wrong_language"] == []
    assert script_shares("ＡＢｱイう") == {"LATIN": pytest.approx(2 / 5), "KANA": pytest.approx(3 / 5)}


def test_references_without_letters_tell_nothing_of_a_language():
    assert found(["ein Preis"], ["12,50"], ["a price in euros"])["wrong_language"] == []


def test_each_pair_of_languages_is_judged_by_its_own_rows(real):
    """Half of the rows go from English to German, half back: outputs right in one half are wrong in the other."""
    english, german = real
    half = NUM_ROWS // 2
    sources, references = english[:half] + german[half:], german[:half] + english[half:]
    pairs = [("en", "de")] * half + [("de", "en")] * half
    outputs = references[1:half] + references[:1] + references[half + 1 :] + references[half : half + 1]
    assert len(found(sources, references, outputs, pairs)["wrong_language"]) < 0.02 * NUM_ROWS
    assert len(found(sources, references, outputs[half:] + outputs[:half], pairs)["wrong_language"]) > 0.95 * NUM_ROWS


def test_trigrams_are_those_of_words():
    assert trigrams("Ab c, 12") == {" ab": 1, "ab ": 1, " c ": 1}
    assert " \u0915\u093f" in trigrams("\u0915\u093f\u0924\u093e\u092c")  # Hindi: a vowel sign parts no word


def test_sides_of_one_language_are_not_told_apart(real):
    """Answers in the language of the questions, as those of a chat model."""
    sources, _ = real
    assert not Languages(sources[::2], sources[1::2]).are_told_apart
    assert not Languages(sources[:3], sources[3:6]).are_told_apart


def test_the_page_says_how_well_languages_are_told_apart(real):
    methods = {}
    for name, num_rows in (("many", NUM_ROWS), ("few", 3)):
        sources, references = (side[:num_rows] for side in real)
        sentences = Sentences.of(sources, references, [[Output(text, 0.0)] for text in references])
        methods[name] = next(one.method for one in find_suspects(sentences) if one.name == "wrong_language")
    assert "99." in methods["many"]
    assert "too little text" in methods["few"]


def test_the_same_output_for_sources_that_differ():
    sources = ["one", "two", "three", "One", "four"]
    references = ["eins", "zwei", "drei", "eins", "vier"]
    assert found(sources, references, ["ja", "zwei", "ja", "eins", "ja"])["same_output"] == [0, 2, 4]
    assert found(sources, references, references)["same_output"] == []


def test_outputs_at_the_length_limit():
    outputs = [[Output("eins", -1.0)], [Output("zwei zwei", -1.0, is_at_limit=True)]]
    suspects = find_suspects(Sentences.of(["one", "two"], ["eins", "zwei"], outputs))
    assert next(one.rows for one in suspects if one.name == "at_limit") == [1]


def test_empty_outputs_are_nothing_else():
    alarms = found(["Stop now."] * 3, ["Halt jetzt an."] * 3, ["", " ", "\u3000"])
    assert alarms.pop("empty") == [0, 1, 2]
    assert not any(alarms.values())


def test_lengths_are_compared_with_what_is_usual_in_the_set():
    references = ["Ein Satz von mittlerer Länge, wie er oft vorkommt."] * 10
    outputs = [text[:40] for text in references]
    outputs[2], outputs[4], outputs[5] = "Kurz.", outputs[4] * 3, outputs[5] * 4
    alarms = found(["x"] * 10, references, outputs)
    assert (alarms["too_short"], alarms["too_long"]) == ([2], [5, 4])
