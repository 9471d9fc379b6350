"""Rows, decoder inputs and losses of each family against its own Hugging Face tokeniser and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.models.m2m_100.modeling_m2m_100 import shift_tokens_right as m2m100_shift
from transformers.models.marian.modeling_marian import shift_tokens_right as marian_shift
from transformers.models.mbart.modeling_mbart import shift_tokens_right as mbart_shift

from harness.config.schema import ModelConfig
from harness.errors import ConfigError, DataError
from harness.models.families import M2M100, MARIAN, MBART, MBART50, NLLB, NLLB_LEGACY, T5, Family, family_of
from harness.models.load import load_family, load_model
from harness.models.tokenizer import TextInput, train_tokenizer
from harness.objectives.cross_entropy import label_smoothed_cross_entropy
from tests.pairs import PAIRS
from tests.tiny import LANGUAGES, make_tiny_model

NAMES = ("mbart", "mbart50", "nllb", "m2m100", "marian", "t5")
EXPECTED = {"mbart": MBART, "mbart50": MBART50, "nllb": NLLB, "m2m100": M2M100, "marian": MARIAN, "t5": T5}
ROWS = PAIRS[:6]
MAX_LENGTH = 100


@pytest.fixture(scope="module")
def directories(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_models | {"m2m100": make_tiny_model("m2m100", tmp_path_factory.mktemp("families") / "m2m100")}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def huggingface_batch(tokenizer: Any, name: str, rows: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """What the family's own tokeniser makes of the rows, unpadded."""
    if LANGUAGES[name][0]:
        tokenizer.src_lang, tokenizer.tgt_lang = LANGUAGES[name]
    sources, targets = zip(*rows, strict=True)
    return dict(tokenizer(list(sources), text_target=list(targets), **options))


def our_rows(family: Family, tokenizer: Any, name: str, max_length: int = MAX_LENGTH) -> tuple[Any, Any]:
    sources, targets = zip(*ROWS, strict=True)
    source_language, target_language = LANGUAGES[name]
    encoded = family.encode_sources(tokenizer, sources, [source_language] * len(ROWS), max_length)
    labels = family.encode_targets(tokenizer, targets, [target_language] * len(ROWS), max_length)
    return encoded, labels


def shift_like_huggingface(name: str, model: Any, labels: torch.Tensor) -> torch.Tensor:
    if name == "t5":
        return model._shift_right(labels)
    if name == "mbart":
        return mbart_shift(labels, model.config.pad_token_id)
    shift = marian_shift if name == "marian" else m2m100_shift
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def test_the_family_is_recognised(name: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[name])
    assert family.name == EXPECTED[name].name
    assert (family.source, family.labels) == (EXPECTED[name].source, EXPECTED[name].labels)
    start = EXPECTED[name].decoder_start(tokenizer, LANGUAGES[name][1])
    assert family.decoder_start(tokenizer, LANGUAGES[name][1]) == start


def test_rows_equal_those_of_the_familys_own_tokeniser(name: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[name])
    sources, labels = our_rows(family, tokenizer, name)
    theirs = huggingface_batch(tokenizer, name, ROWS)
    assert [row.ids for row in sources] == theirs["input_ids"]
    assert [row.ids for row in labels] == theirs["labels"]
    assert not any(row.truncated for row in [*sources, *labels])


def test_truncated_rows_keep_their_tags(name: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[name])
    sources, labels = our_rows(family, tokenizer, name, max_length=12)
    theirs = huggingface_batch(tokenizer, name, ROWS, truncation=True, max_length=12)
    assert [row.ids for row in sources] == theirs["input_ids"]
    assert [row.ids for row in labels] == theirs["labels"]
    whole_sources, whole_labels = our_rows(family, tokenizer, name)
    for cut, whole in zip([*sources, *labels], [*whole_sources, *whole_labels], strict=True):
        assert cut.truncated == (len(whole.ids) > 12)


def test_decoder_inputs_and_token_losses_equal_the_familys_own(name: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[name])
    model = load_model(ModelConfig(path=str(directories[name])), seed=0).eval()
    sources, labels = our_rows(family, tokenizer, name)
    start = family.decoder_start(tokenizer, LANGUAGES[name][1])
    batch = {
        "input_ids": padded([row.ids for row in sources], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row.ids) for row in sources], 0),
    }
    labels_BT = padded([row.ids for row in labels], -100)
    decoder_BT = padded([[start, *row.ids[:-1]] for row in labels], tokenizer.pad_token_id)
    assert (labels_BT == -100).any()
    counted_BT = labels_BT != -100
    theirs_BT = shift_like_huggingface(name, model, labels_BT)
    assert torch.equal(decoder_BT[counted_BT], theirs_BT[counted_BT])

    with torch.no_grad():
        logits_BTV = model(**batch, decoder_input_ids=decoder_BT).logits
        theirs = model(**batch, labels=labels_BT)
    ours = label_smoothed_cross_entropy(logits_BTV, labels_BT, epsilon=0.0)
    torch.testing.assert_close(logits_BTV[counted_BT], theirs.logits[counted_BT], atol=1e-5, rtol=1e-5)
    assert int(ours.num_targets) == sum(len(row.ids) for row in labels)
    torch.testing.assert_close(ours.nll_sum / ours.num_targets, theirs.loss, atol=1e-5, rtol=1e-5)


def test_each_row_of_a_batch_has_its_own_language(directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories["mbart"])
    texts, languages = [PAIRS[0][0], PAIRS[0][1], PAIRS[1][1]], ["en_XX", "de_DE", "fr_XX"]
    rows = family.encode_sources(tokenizer, texts, languages, MAX_LENGTH)
    single = [
        family.encode_source(tokenizer, text, code, MAX_LENGTH) for text, code in zip(texts, languages, strict=True)
    ]
    assert rows == single
    assert tokenizer.convert_ids_to_tokens([row.ids[-1] for row in rows]) == languages


@pytest.mark.parametrize("forced", ["mbart50", "nllb", "m2m100"])
def test_the_forced_token_is_the_first_label(forced: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[forced])
    language = LANGUAGES[forced][1]
    label = family.encode_target(tokenizer, PAIRS[0][1], language, MAX_LENGTH)
    assert family.forced_first(tokenizer, language) == label.ids[0]


@pytest.mark.parametrize("free", ["mbart", "marian", "t5"])
def test_nothing_is_forced_in_the_other_families(free: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[free])
    assert family.forced_first(tokenizer, LANGUAGES[free][1]) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_row_that_is_allowed_is_the_longest_that_works(name: str, directories: dict[str, Path]) -> None:
    family, _ = load_family(directories[name])
    model = load_model(ModelConfig(path=str(directories[name])), seed=0).eval()
    family.check_length(128, "data.max_source_length")
    ids = torch.full((1, 129), 5)
    if name in ("mbart", "mbart50", "marian"):
        with pytest.raises(ConfigError, match="129 tokens are more than the model's 128 positions") as error:
            family.check_length(129, "data.max_source_length")
        assert error.value.where == "data.max_source_length"
        with pytest.raises(IndexError):
            model(input_ids=ids, decoder_input_ids=ids)
        ids = ids[:, :128]
    else:
        family.check_length(129, "data.max_source_length")
    with torch.no_grad():
        assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_decoding_labels_gives_the_text_back(name: str, directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories[name])
    _, labels = our_rows(family, tokenizer, name)
    assert family.decode(tokenizer, [row.ids for row in labels]) == [target for _, target in ROWS]
    eos = tokenizer.eos_token_id
    first = labels[0].ids[: labels[0].ids.index(eos)]
    assert family.decode(tokenizer, [[*first, eos, *labels[1].ids]]) == [ROWS[0][1]]


def test_the_mask_in_a_text_is_the_mask_token(directories: dict[str, Path]) -> None:
    family, tokenizer = load_family(directories["mbart"])
    row = family.encode_source(tokenizer, "The <mask> sleeps.", "en_XX", MAX_LENGTH)
    assert row.ids.count(tokenizer.mask_token_id) == 1


def test_marian_reads_targets_with_the_target_pieces(tmp_path: Path) -> None:
    """A Marian tokeniser whose two sides cut words differently."""
    directory = make_tiny_model("marian", tmp_path / "marian")
    other = train_tokenizer("marian", [TextInput(tmp_path / "marian.txt")], tmp_path / "other", vocab_size=150)
    (directory / "target.spm").write_bytes((tmp_path / "other" / "target.spm").read_bytes())
    family, tokenizer = load_family(directory)
    source = family.encode_source(tokenizer, PAIRS[0][0], None, MAX_LENGTH).ids
    target = family.encode_target(tokenizer, PAIRS[0][0], None, MAX_LENGTH).ids
    assert target != source
    assert target == tokenizer(text_target=PAIRS[0][0])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(target) == [*other.tokenize(PAIRS[0][0]), "</s>"]


def test_a_legacy_nllb_tokeniser_puts_the_source_tag_last(directories: dict[str, Path]) -> None:
    _, tokenizer = load_family(directories["nllb"])
    tokenizer.legacy_behaviour = True
    family = family_of({"model_type": "m2m_100"}, tokenizer)
    assert family == NLLB_LEGACY
    tokenizer.src_lang = "eng_Latn"
    row = family.encode_source(tokenizer, PAIRS[0][0], "eng_Latn", MAX_LENGTH)
    assert row.ids == tokenizer(PAIRS[0][0])["input_ids"]


@pytest.mark.parametrize(
    ("name", "language", "hint"),
    [
        ("mbart", "de", "de_DE"),
        ("mbart", "de_XX", "de_DE"),
        ("mbart", "</s>", "known: ar_AR"),
        ("mbart50", "uk", "uk_UA"),
        ("nllb", "deu", "deu_Latn"),
        ("nllb", "deu_latn", "deu_Latn"),
        ("m2m100", "de_DE", "de"),
        ("mbart", None, "known: ar_AR"),
    ],
)
def test_unknown_languages_are_refused(
    name: str, language: str | None, hint: str, directories: dict[str, Path]
) -> None:
    family, tokenizer = load_family(directories[name])
    with pytest.raises(DataError) as source_error:
        family.encode_source(tokenizer, "x", language, MAX_LENGTH)
    assert source_error.value.where == "data.source_language"
    assert hint in source_error.value.hint
    with pytest.raises(DataError) as target_error:
        family.encode_target(tokenizer, "x", language, MAX_LENGTH)
    assert target_error.value.where == "data.target_language"


def test_unknown_model_types_are_refused() -> None:
    with pytest.raises(DataError, match="'llama'") as error:
        family_of({"model_type": "llama"}, None)  # type: ignore[arg-type]
    assert "mbart, m2m_100, marian, t5, mt5" in error.value.hint
