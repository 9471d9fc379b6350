"""Trains a sentencepiece model on the user's text and writes it as the tokeniser of a model family.

The number of ids is exactly the one asked for: special tokens and language tags (the family's full inventory)
are counted, the pieces fill the rest. Equal input gives equal files.
"""

from __future__ import annotations

import gzip
import io
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import (
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M100_CODES
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as MBART_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES
from transformers.tokenization_utils_base import generate_merges

from harness.errors import ConfigError, DataError
from harness.io.atomic import write_json

FAIRSEQ_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
T5_SPECIALS = ["<pad>", "</s>", "<unk>"]
T5_SENTINELS = [f"<extra_id_{index}>" for index in reversed(range(100))]
M2M100_SPARE_IDS = 8


@dataclass(frozen=True)
class Recipe:
    """How a family's tokeniser is laid out: ids before the pieces, ids after them, and the sentencepiece settings.

    mBART's tokeniser does not normalise text, so neither may its training.
    """

    before: list[str]
    after: list[str]
    model_type: Literal["unigram", "bpe"] = "unigram"
    normalization: Literal["identity", "nmt_nfkc"] = "nmt_nfkc"
    spare_ids: int = 0

    @property
    def num_reserved(self) -> int:
        return len(self.before) + len(self.after) + self.spare_ids


RECIPES: dict[str, Recipe] = {
    "mbart": Recipe(FAIRSEQ_SPECIALS, [*MBART_CODES, "<mask>"], normalization="identity"),
    "mbart50": Recipe(FAIRSEQ_SPECIALS, [*MBART50_CODES, "<mask>"]),
    "nllb": Recipe(FAIRSEQ_SPECIALS, [*NLLB_CODES, "<mask>"], model_type="bpe"),
    "m2m100": Recipe(
        FAIRSEQ_SPECIALS,
        [f"__{code}__" for code in M2M100_CODES["m2m100"]],
        model_type="bpe",
        spare_ids=M2M100_SPARE_IDS,
    ),
    "marian": Recipe(["</s>", "<unk>"], ["<pad>"]),
    "t5": Recipe(T5_SPECIALS, T5_SENTINELS),
}


@dataclass(frozen=True)
class TextInput:
    """A .txt or .tsv file (.gz too); of a table, the columns to read by name."""

    path: Path
    columns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> TextInput:
        """`corpus.tsv.gz:source,target` or `corpus.txt`. Raises ConfigError if a table comes without columns."""
        path, _, columns = text.rpartition(":") if _is_table(text.rpartition(":")[0]) else (text, "", "")
        if _is_table(path) and not columns:
            raise ConfigError("a table needs its columns", where=f"--input {text}", hint=f"{text}:source,target")
        return cls(Path(path), tuple(columns.split(",")) if columns else ())

    def texts(self) -> Iterator[str]:
        """The non-empty texts. Raises DataError if the file or a column is missing or the text is not UTF-8."""
        if not self.path.is_file():
            raise DataError("no such file", where=str(self.path))
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opener(self.path, "rt", encoding="utf-8") as lines:
                rows = (line.rstrip("\n") for line in lines)
                yield from filter(str.strip, self._cells(rows) if self.columns else rows)
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"cannot be read: {error}", where=str(self.path)) from error

    def _cells(self, rows: Iterator[str]) -> Iterator[str]:
        header = next(rows, "").split("\t")
        for column in self.columns:
            if column not in header:
                hint = f"its columns: {', '.join(header)}"
                raise DataError(f"there is no column {column!r}", where=f"{self.path}:1", hint=hint)
        wanted = [header.index(column) for column in self.columns]
        for row in rows:
            cells = row.split("\t")
            yield from (cells[index] for index in wanted if index < len(cells))


def train_tokenizer(
    family: str,
    inputs: Sequence[TextInput],
    directory: Path,
    *,
    vocab_size: int,
    character_coverage: float = 1.0,
    max_sentences: int = 5_000_000,
) -> PreTrainedTokenizerBase:
    """Trains on a random sample of at most `max_sentences` texts, writes `directory`, returns the tokeniser.

    Raises ConfigError if the vocabulary is too small for the family's tags or `directory` is not empty, DataError if
    the text cannot fill the vocabulary.
    """
    recipe = RECIPES[family]
    num_pieces = vocab_size - recipe.num_reserved
    if num_pieces <= 0:
        what = f"{vocab_size} ids are too few: {family} reserves {recipe.num_reserved} for special tokens and tags"
        raise ConfigError(what, where="--vocab-size")
    if not 0.0 < character_coverage <= 1.0:
        raise ConfigError(f"must lie in (0, 1], not {character_coverage}", where="--character-coverage")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError("the directory is not empty", where=f"--output {directory}", hint="give a new one")
    texts = _sample(itertools.chain.from_iterable(source.texts() for source in inputs), max_sentences)
    if not texts:
        raise DataError("there is no text to train on", where=", ".join(str(source.path) for source in inputs))
    model = _train(texts, recipe, num_pieces, character_coverage)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build(family, recipe, model, directory)
    tokenizer.save_pretrained(str(directory))
    return tokenizer


def _is_table(path: str) -> bool:
    return path.removesuffix(".gz").endswith(".tsv")


def _sample(texts: Iterable[str], size: int) -> list[str]:
    """Uniform sample in one pass (reservoir), the same on every call."""
    generator = random.Random(0)
    sample: list[str] = []
    for index, text in enumerate(texts):
        if index < size:
            sample.append(text)
        elif (slot := generator.randrange(index + 1)) < size:
            sample[slot] = text
    return sample


def _train(texts: list[str], recipe: Recipe, num_pieces: int, character_coverage: float) -> bytes:
    """A serialised sentencepiece model with `<unk> <s> </s>` and `num_pieces` pieces."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=num_pieces + 3,
            model_type=recipe.model_type,
            normalization_rule_name=recipe.normalization,
            character_coverage=character_coverage,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rsplit("] ", 1)[-1].strip()
        hint = "choose another --vocab-size or give more text"
        raise DataError(f"sentencepiece cannot train: {reason}", hint=hint) from error
    return model.getvalue()


def _build(family: str, recipe: Recipe, model: bytes, directory: Path) -> PreTrainedTokenizerBase:
    """The family's own tokeniser around a sentencepiece model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    scored = [(token, 0.0) for token in recipe.before] + pieces + [(token, 0.0) for token in recipe.after]
    ids = {token: index for index, (token, _) in enumerate(scored)}
    charsmap: dict[str, Any] = {"_spm_precompiled_charsmap": proto.normalizer_spec.precompiled_charsmap}
    if family == "mbart":
        return MBartTokenizer(vocab=scored)
    if family == "mbart50":
        return MBart50Tokenizer(vocab=scored, **charsmap)
    if family == "nllb":
        merges = generate_merges({piece: ids[piece] for piece, _ in pieces})
        return NllbTokenizer(vocab=ids, merges=merges, **charsmap)
    if family == "t5":
        return T5Tokenizer(vocab=scored, **charsmap)
    names = ("sentencepiece.bpe.model",) if family == "m2m100" else ("source.spm", "target.spm")
    for name in names:
        (directory / name).write_bytes(model)
    if family == "m2m100":
        encoder = {token: index for token, index in ids.items() if token not in recipe.after}
        write_json(directory / "vocab.json", encoder)
        return M2M100Tokenizer(str(directory / "vocab.json"), str(directory / names[0]))
    write_json(directory / "vocab.json", ids)
    return MarianTokenizer(*(str(directory / name) for name in names), vocab=str(directory / "vocab.json"))
