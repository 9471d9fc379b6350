"""`harness tokenizer train`: layout, determinism, round trip, and the user's mistakes."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from harness.cli import tokenizer as command
from harness.cli.main import main
from harness.errors import ConfigError, DataError
from harness.models.families import MBART
from harness.models.tokenizer import RECIPES, TextInput, _sample, train_tokenizer
from tests.pairs import PAIRS

FRENCH = ["L'élève a mangé une pêche à Noël.", "Où est la gare, s'il vous plaît ?", "Ça va très bien, merci."]
TEXTS = [text for pair in PAIRS for text in pair] + FRENCH
CLASSES = {
    "mbart": "MBartTokenizer",
    "mbart50": "MBart50Tokenizer",
    "nllb": "NllbTokenizer",
    "m2m100": "M2M100Tokenizer",
    "marian": "MarianTokenizer",
    "t5": "T5Tokenizer",
}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("family", RECIPES)
def test_texts_survive_the_round_trip(family: str, text_file: Path, tmp_path: Path) -> None:
    vocab_size = RECIPES[family].num_reserved + 320
    train_tokenizer(family, [TextInput(text_file)], tmp_path / "out", vocab_size=vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(tokenizer).__name__ == CLASSES[family]
    rows = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(rows) == TEXTS
    assert max(tokenizer.get_vocab().values()) == vocab_size - 1 - (108 if family == "m2m100" else 0)


def test_the_ids_of_an_mbart_tokeniser_are_those_of_the_real_one(text_file: Path, tmp_path: Path) -> None:
    """fairseq's order: specials, pieces, the 25 codes, the mask."""
    tokenizer = train_tokenizer("mbart", [TextInput(text_file)], tmp_path / "out", vocab_size=350)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 349]
    assert tokenizer.convert_tokens_to_ids(FAIRSEQ_LANGUAGE_CODES) == list(range(324, 349))
    assert list(MBART.languages(tokenizer)) == FAIRSEQ_LANGUAGE_CODES


@pytest.mark.parametrize("family", RECIPES)
def test_equal_text_gives_equal_files(family: str, text_file: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        train_tokenizer(family, [TextInput(text_file)], tmp_path / name, vocab_size=RECIPES[family].num_reserved + 300)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_unknown_characters_are_left_out_below_full_coverage(text_file: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        "mbart", [TextInput(text_file)], tmp_path / "out", vocab_size=330, character_coverage=0.99
    )
    assert tokenizer.unk_token_id in tokenizer("Ça")["input_ids"]


def test_columns_of_a_compressed_table_are_read(tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv.gz"
    with gzip.open(table, "wt", encoding="utf-8") as file:
        file.write("id\tsource\ttarget\n1\tone\teins\n\n2\ttwo\tzwei\n3\tthree\n")
    assert list(TextInput.parse(f"{table}:target,source").texts()) == ["eins", "one", "zwei", "two", "three"]
    assert list(TextInput.parse(f"{table}:source").texts()) == ["one", "two", "three"]


def test_a_colon_in_a_plain_path_is_part_of_it() -> None:
    assert TextInput.parse("a:b.txt") == TextInput(Path("a:b.txt"))


def test_the_sample_is_uniform_and_always_the_same() -> None:
    texts = [str(index) for index in range(10_000)]
    sample = _sample(texts, 1000)
    assert len(set(sample)) == 1000
    assert sample == _sample(iter(texts), 1000)
    assert abs(sum(map(int, sample)) / 1000 - 5000) < 300
    assert _sample(texts, 20_000) == texts


def test_the_command_writes_a_tokeniser(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    arguments = ["--family", "mbart", "--vocab-size", "340", "--input", str(text_file), "--output", out]
    assert main(["tokenizer", "train", *arguments]) == 0
    assert capsys.readouterr().out == f"MBartTokenizer with 340 ids in {out}\n"
    assert len(AutoTokenizer.from_pretrained(out)) == 340


def test_the_command_knows_every_recipe() -> None:
    assert tuple(RECIPES) == command.FAMILIES


def test_mistakes_are_named(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = tmp_path / "t.tsv"
    table.write_text("source\ttarget\na\tb\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff\n")
    for path, message in [
        (TextInput(tmp_path / "gone.txt"), "no such file"),
        (TextInput(empty), "no text to train on"),
        (TextInput(binary), "cannot be read"),
        (TextInput(table, ("sauce",)), "no column 'sauce'"),
        (TextInput(text_file), "sentencepiece cannot train: Vocabulary size too high"),
    ]:
        with pytest.raises(DataError, match=message):
            train_tokenizer("mbart", [path], out, vocab_size=9000)
    with pytest.raises(ConfigError, match="a table needs its columns"):
        TextInput.parse(str(table))
    with pytest.raises(ConfigError, match="nllb reserves 207"):
        train_tokenizer("nllb", [TextInput(text_file)], out, vocab_size=200)
    with pytest.raises(ConfigError, match="must lie in"):
        train_tokenizer("mbart", [TextInput(text_file)], out, vocab_size=300, character_coverage=1.5)
    with pytest.raises(ConfigError, match="not empty"):
        train_tokenizer("mbart", [TextInput(text_file)], tmp_path, vocab_size=300)
    assert not out.exists()
