"""The one table of model families: where language tags go, what the decoder starts with, what is forced first.

A row is built from a template whose parts are ``text``, ``eos`` and ``language``; the decoder input of a row is
always ``[decoder_start] + labels[:-1]``. Checked against the families' own tokenisers in tests/numerics.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from harness.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["text", "eos", "language"]
Side = Literal["source", "target"]

TEXT_EOS: tuple[Part, ...] = ("text", "eos")
TEXT_EOS_LANGUAGE: tuple[Part, ...] = ("text", "eos", "language")
LANGUAGE_TEXT_EOS: tuple[Part, ...] = ("language", "text", "eos")


class Encoded(NamedTuple):
    """Token ids of one row, tags included, and whether text was cut off to fit the longest length."""

    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Family:
    """How one model family wants its rows.

    ``start`` is a token id where config.json names one; ``max_length`` is the number of positions in tokens where
    the model has no more (mBART, Marian).
    """

    name: str
    source: tuple[Part, ...]
    labels: tuple[Part, ...]
    start: Literal["language", "eos", "pad"] | int
    force_language: bool = False
    language_token: str = ""
    target_pieces: bool = False
    max_length: int | None = None

    @property
    def has_languages(self) -> bool:
        """True if rows carry language tags; False if a language is ignored (Marian, T5: use a source prefix)."""
        return bool(self.language_token)

    def check_length(self, max_length: int, key: str) -> None:
        """Raises ConfigError if rows of the run file's `key` may become longer than the model's positions."""
        if self.max_length is not None and max_length > self.max_length:
            what = f"{max_length} tokens are more than the model's {self.max_length} positions"
            raise ConfigError(what, where=key, hint=f"{key}={self.max_length}")

    def languages(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """Language code -> token id of every language tag that the tokeniser has."""
        if not self.has_languages:
            return {}
        pattern = re.compile(self.language_token)
        vocabulary = tokenizer.get_added_vocab() | getattr(tokenizer, "lang_token_to_id", {})
        return {match[1]: id for token, id in vocabulary.items() if (match := pattern.fullmatch(token))}

    def language_id(self, tokenizer: PreTrainedTokenizerBase, language: str | None, side: Side) -> int:
        """Token id of a language's tag. Raises DataError if it is missing or the tokeniser lacks it."""
        known = self.languages(tokenizer)
        if language is None:
            raise DataError(f"{self.name} needs a language", where=f"data.{side}_language", hint=_nearest("", known))
        if language not in known:
            what = f"the tokeniser has no language {language!r}"
            raise DataError(what, where=f"data.{side}_language", hint=_nearest(language, known))
        return known[language]

    def encode_sources(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], languages: Sequence[str | None], max_length: int
    ) -> list[Encoded]:
        """Encoder inputs of many rows, at most `max_length` tokens each with all tags kept."""
        pieces = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return self._tagged(tokenizer, self.source, pieces["input_ids"], languages, max_length, "source")

    def encode_targets(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], languages: Sequence[str | None], max_length: int
    ) -> list[Encoded]:
        """Labels of many rows, at most `max_length` tokens each with all tags kept."""
        pieces = self.target_pieces_of(tokenizer, texts)
        return self._tagged(tokenizer, self.labels, pieces, languages, max_length, "target")

    def target_pieces_of(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts in the target language, without tags."""
        rows = {"text_target" if self.target_pieces else "text": list(texts)}
        pieces = tokenizer(**rows, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(pieces["input_ids"])

    def encode_source(
        self, tokenizer: PreTrainedTokenizerBase, text: str, language: str | None, max_length: int
    ) -> Encoded:
        """Encoder input of one row."""
        return self.encode_sources(tokenizer, [text], [language], max_length)[0]

    def encode_target(
        self, tokenizer: PreTrainedTokenizerBase, text: str, language: str | None, max_length: int
    ) -> Encoded:
        """Labels of one row."""
        return self.encode_targets(tokenizer, [text], [language], max_length)[0]

    def decoder_start(self, tokenizer: PreTrainedTokenizerBase, language: str | None) -> int:
        """The decoder's first input token for a row in the target `language`."""
        if self.start == "language":
            return self.language_id(tokenizer, language, "target")
        if isinstance(self.start, int):
            return self.start
        return int(tokenizer.eos_token_id if self.start == "eos" else tokenizer.pad_token_id)

    def forced_first(self, tokenizer: PreTrainedTokenizerBase, language: str | None) -> int | None:
        """The token that decoding must emit first, or None."""
        return self.language_id(tokenizer, language, "target") if self.force_language else None

    def decode(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of token ids, without tags and special tokens; a row ends at its end-of-sentence token."""
        tags = set(self.languages(tokenizer).values())
        eos = tokenizer.eos_token_id
        texts = [[id for id in itertools.takewhile(lambda id: id != eos, row) if id not in tags] for row in rows]
        return list(tokenizer.batch_decode(texts, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tagged(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: tuple[Part, ...],
        pieces: list[list[int]],
        languages: Sequence[str | None],
        max_length: int,
        side: Side,
    ) -> list[Encoded]:
        """Puts the template's tags around each row of pieces; pieces beyond `max_length` are dropped at the end."""
        room = max_length - (len(template) - 1)
        frames = {language: self._frame(tokenizer, template, language, side) for language in set(languages)}
        rows = []
        for ids, language in zip(pieces, languages, strict=True):
            before, after = frames[language]
            rows.append(Encoded(before + ids[:room] + after, len(ids) > room))
        return rows

    def _frame(
        self, tokenizer: PreTrainedTokenizerBase, template: tuple[Part, ...], language: str | None, side: Side
    ) -> tuple[list[int], list[int]]:
        """The token ids before and after the text."""

        def token(part: Part) -> int:
            return int(tokenizer.eos_token_id) if part == "eos" else self.language_id(tokenizer, language, side)

        middle = template.index("text")
        return [token(part) for part in template[:middle]], [token(part) for part in template[middle + 1 :]]


MBART = Family("mBART", TEXT_EOS_LANGUAGE, TEXT_EOS_LANGUAGE, "language", language_token=r"([a-z]{2,3}_[A-Z]{2})")
MBART50 = replace(
    MBART, name="mBART-50", source=LANGUAGE_TEXT_EOS, labels=LANGUAGE_TEXT_EOS, start="eos", force_language=True
)
NLLB = replace(MBART50, name="NLLB", language_token=r"([a-z]{3}_[A-Z][a-z]{3})")
NLLB_LEGACY = replace(NLLB, source=TEXT_EOS_LANGUAGE)
M2M100 = replace(MBART50, name="M2M100", language_token=r"__([a-z]{2,3})__")
MARIAN = Family("Marian", TEXT_EOS, TEXT_EOS, "pad", target_pieces=True)
T5 = Family("T5", TEXT_EOS, TEXT_EOS, "pad")

FAMILIES: dict[str, Family] = {"mbart": MBART, "m2m_100": M2M100, "marian": MARIAN, "t5": T5, "mt5": T5}
FIXED_POSITIONS = ("mbart", "marian")


def check_model_type(model_type: object) -> None:
    """Raises DataError if config.json's `model_type` is of no supported family."""
    if model_type not in FAMILIES:
        hint = f"supported: {', '.join(FAMILIES)}"
        raise DataError(f"model type {model_type!r} is not supported", where="config.json", hint=hint)


def family_of(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Family:
    """The family of a model directory: `config` is its config.json. Raises DataError for any other model type.

    The model types `mbart` and `m2m_100` stand for two families each; the tokeniser's class tells which.
    """
    model_type = str(config.get("model_type"))
    check_model_type(model_type)
    family = FAMILIES[model_type]
    tokenizer_class = type(tokenizer).__name__
    if model_type == "mbart" and tokenizer_class.startswith("MBart50"):
        family = MBART50
    if model_type == "m2m_100" and tokenizer_class.startswith("Nllb"):
        family = NLLB_LEGACY if tokenizer.legacy_behaviour else NLLB
    if model_type in FIXED_POSITIONS:
        family = replace(family, max_length=config.get("max_position_embeddings"))
    start = config.get("decoder_start_token_id")
    return family if family.start == "language" or start is None else replace(family, start=start)


def _nearest(language: str, known: Mapping[str, int]) -> str:
    """The same language in another country or script, else names spelled alike, else all."""
    stem = language.lower().partition("_")[0]
    near = [code for code in known if code.partition("_")[0] == stem]
    near = near or difflib.get_close_matches(language, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(sorted(known))}"
