"""Causal language modelling: documents, prompts with completions, and conversations for a decoder.

Shapes: B packs or rows, T positions. Labels are stored shifted: labels[t] is the token after input_ids[t] where that is
to be learned, else -100. So no position predicts a token of another row, and a document in parts loses no token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.config.schema import DataConfig, LossConfig
from harness.data.clean import bad_row
from harness.data.encoded import Encoded
from harness.data.loader import pack_length
from harness.data.prompts import PairPrompts, pair_prompts
from harness.data.rows import BadRow, Message, Row
from harness.errors import DataError
from harness.models.chat import ChatTemplate, MarkedTokens, encode_marked
from harness.models.stops import StopStrings
from harness.objectives.cross_entropy import LossTerms, label_smoothed_cross_entropy
from harness.tasks.task import IGNORED, Batch, DecodingTask, Example, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalTask(DecodingTask):
    """Rows and token ids of one tokeniser.

    `in_one_row`: a micro-batch is one row of all its packs, without padding, as flash attention wants it.
    `stop_strings` end an answer, which is what stands before them.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    objective: LossConfig
    in_one_row: bool = False
    stop_strings: tuple[str, ...] = ()

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """One example per row, cut after `data.max_length` tokens. Raises DataError for a row that the chat template
        cannot write."""
        return [self._example(self._marked(row)[-1]) for row in rows]

    def encode_for_training(self, rows: list[Row]) -> list[tuple[Row, Encoded] | BadRow]:
        """As `encode`, but a document is cut into as many examples as it needs, and a conversation gives several if its
        template writes a turn in another way once it is past (see `ChatTemplate.encode`)."""
        return [one for row in rows for one in self._examples_of(row)]

    def encode_for_scores(self, rows: list[Row]) -> list[tuple[Row, Encoded] | BadRow]:
        """Documents are scored to their end, of a conversation the last answer is; a pair if its prompt is whole."""
        if self._prompts is not None:
            return [self._scored_pair(row) for row in rows]
        return self.encode_for_training(rows) if self.data.format == "text" else super().encode_for_scores(rows)

    def encode_sources(self, rows: Sequence[Row]) -> list[Encoded]:
        """Prompts of rows without an answer, of which only the source (and languages) is read.

        The source of a pair loses its end where its prompt would have more than `data.max_length` tokens. Raises
        DataError for any other prompt that is longer: its end is what asks for the answer.
        """
        return [self._asked(row) for row in rows]

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Packs (or rows) padded at the end; no examples give one row without targets.

        In a pack positions start again at 0 with each row, which is how transformers knows to hide the rows from each
        other when there is no attention mask.
        """
        packs = self._packs(examples) or [[((self._eos,), (IGNORED,), 0)]]
        ids = [np.concatenate([ids for ids, _, _ in pack]) for pack in packs]
        labels = [np.concatenate([labels for _, labels, _ in pack]) for pack in packs]
        inputs = {"input_ids": pad(ids, self._eos)}
        if pack_length(self.data) is None:
            inputs["attention_mask"] = pad([np.ones(len(row), dtype=np.int64) for row in ids], 0)
        else:
            positions = [np.concatenate([np.arange(len(ids)) for ids, _, _ in pack]) for pack in packs]
            inputs["position_ids"] = pad(positions, 0)
        num_padded = inputs["input_ids"].numel() if examples else 0
        num_tokens = sum(len(ids) for ids, _, _ in examples)
        on_device = {name: value.to(device) for name, value in inputs.items()}
        return Batch({**on_device, "use_cache": False}, pad(labels, IGNORED).to(device), num_padded, num_tokens)

    def loss(self, logits: Tensor, batch: Batch) -> LossTerms:
        """Label-smoothed cross entropy of the tokens to learn."""
        smoothing, convention = self.objective.label_smoothing, self.objective.convention
        return label_smoothed_cross_entropy(logits, batch.labels, epsilon=smoothing, convention=convention)

    def collate_sources(self, examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
        """What comes before the last answer of each example, padded at the start so that all end at one position."""
        prompts = [ids[: _start_of_answer(labels)] for ids, labels, _ in examples]
        ids_BS = pad([prompt[::-1] for prompt in prompts], self._eos).flip(1)
        mask_BS = pad([[1] * len(prompt) for prompt in prompts], 0).flip(1)
        on_device = {"input_ids_BS": ids_BS.to(device), "attention_mask_BS": mask_BS.to(device)}
        return {**on_device, "pad": self._eos, "ends": self._ends, "stops": self._stops}

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def to_text(self, token_ids: Sequence[int]) -> str:
        """Text of an answer on one line, up to a stop string, special tokens left out."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return " ".join((text if self._stops is None else self._stops.cut(text)).split())

    def show(self, row: Row) -> str:
        """The examples of one row, token by token; those to learn stand between « and ». Of a pair its prompt first."""
        lines = [] if self._prompts is None else [self._prompts.written(row).source, ""]
        for marked in self._marked(row):
            lines += [self._show(example) for example in self._examples(marked)]
        return "\n".join(lines)

    def _show(self, example: Encoded) -> str:
        learned = [False, *(label != IGNORED for label in example.labels[:-1])]
        tokens = zip(self.tokenizer.convert_ids_to_tokens(example.input_ids), learned, strict=True)
        groups = [(marked, " ".join(token for token, _ in group)) for marked, group in groupby(tokens, lambda t: t[1])]
        text = " ".join(f"«{text}»" if marked else text for marked, text in groups)
        return f"{sum(learned)} of {len(learned)} tokens are learned: {text}"

    def _examples_of(self, row: Row) -> list[tuple[Row, Encoded] | BadRow]:
        if self._prompts is not None and self._prompts.shows(row):
            return [_shown(row)]
        try:
            return [(row, example) for marked in self._marked(row) for example in self._examples(marked)]
        except DataError as error:  # the chat template refuses it
            return [bad_row(row, "chat_template", error.what)]

    def _scored_pair(self, row: Row) -> tuple[Row, Encoded] | BadRow:
        if self._prompts is not None and self._prompts.shows(row):
            return _shown(row)
        example = self._example(self._marked(row)[-1])
        if example.truncated and example.target_size == 0:
            return bad_row(row, "too_long", f"its prompt has {self.data.max_length} tokens (data.max_length) or more")
        return row, example

    def _asked(self, row: Row) -> Encoded:
        def prompt(num_characters: int | None = None) -> list[int]:
            return self._prompt(replace(row, source=row.source[:num_characters]))

        ids, limit = prompt(), self.data.max_length
        is_cut = len(ids) > limit
        if is_cut and self._prompts is not None:
            fitting = bisect_right(range(len(row.source)), limit, key=lambda length: len(prompt(length))) - 1
            ids = prompt(max(0, fitting))
        if len(ids) > limit:
            what = f"a prompt of {len(ids)} tokens is longer than data.max_length ({limit})"
            raise DataError(what, where=row.where, hint=f"data.max_length={len(ids)}, if the model can read so much")
        return Encoded(ids, [IGNORED] * len(ids), truncated=is_cut, num_targets=0)

    def _prompt(self, row: Row) -> list[int]:
        """Token ids of what asks for the row's answer."""
        if self._prompts is not None:
            row = self._prompts.written(row)
        if self._chat is not None:
            question: Message = {"role": "user", "content": row.source}
            return self._chat.prompt(self._messages(replace(row, messages=(question,))), row.where)
        ids = list(self.tokenizer(row.source, verbose=False)["input_ids"])
        return ids[:-1] if ids[-1:] == [self._eos] else ids

    def _marked(self, row: Row) -> list[MarkedTokens]:
        """The row in tokens before anything is cut."""
        if self._prompts is not None:
            row = self._prompts.written(row)
        if self.data.format == "text":
            ids = list(self.tokenizer(row.source, verbose=False)["input_ids"])
            return [self._ended(MarkedTokens(ids, [True] * len(ids)))]
        if self._chat is not None:
            return self._chat.encode(self._messages(row), row.where)
        text = row.source + row.target
        marked = encode_marked(self.tokenizer, text, [(len(row.source), len(text))], add_special_tokens=True)
        return [self._ended(marked)]

    def _ended(self, marked: MarkedTokens) -> MarkedTokens:
        """With the end-of-text token, which is learned, at the end; many tokenisers put none."""
        ids, is_learned = marked
        if ids[-1:] == [self._eos]:
            ids, is_learned = ids[:-1], is_learned[:-1]
        return MarkedTokens([*ids, self._eos], [*is_learned, True])

    def _examples(self, marked: MarkedTokens) -> list[Encoded]:
        """All parts of a document, or the start of anything else."""
        if self.data.format != "text":
            return [self._example(marked)]
        # The last token of all is predicted from the one before it: alone it has nothing to predict.
        starts = range(0, max(1, len(marked.ids) - 1), self.data.max_length)
        return [self._example(marked, start, is_part=True) for start in starts]

    def _example(self, marked: MarkedTokens, start: int = 0, *, is_part: bool = False) -> Encoded:
        stop = start + self.data.max_length
        following = zip(marked.ids[start + 1 : stop + 1], marked.is_learned[start + 1 : stop + 1], strict=True)
        labels = [token if is_learned else IGNORED for token, is_learned in following]
        ids = marked.ids[start:stop]
        labels += [IGNORED] * (len(ids) - len(labels))
        num_targets = sum(label != IGNORED for label in labels)
        return Encoded(ids, labels, truncated=not is_part and stop < len(marked.ids), num_targets=num_targets)

    def _packs(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The packs that `data.batches.pack` has made, found again by next-fit; rows by themselves without packing."""
        capacity = pack_length(self.data)
        if capacity is None:
            return [[example] for example in examples]
        if self.in_one_row:
            return [list(examples)] if examples else []
        packs: list[list[Example]] = []
        room = -1
        for example in examples:
            if room < len(example[0]):
                packs.append([])
                room = capacity
            packs[-1].append(example)
            room -= len(example[0])
        return packs

    def _messages(self, row: Row) -> tuple[Message, ...]:
        """The row's conversation, with the run's system message if it has none."""
        prompt = self.data.system_prompt
        if prompt is None or any(message["role"] == "system" for message in row.messages):
            return row.messages
        return ({"role": "system", "content": prompt}, *row.messages)

    @cached_property
    def _prompts(self) -> PairPrompts | None:
        return pair_prompts(self.data) if self.data.has_prompts else None

    @cached_property
    def _stops(self) -> StopStrings | None:
        return StopStrings(self.tokenizer, self.stop_strings) if self.stop_strings else None

    @cached_property
    def _chat(self) -> ChatTemplate | None:
        """None if prompts and completions are simply joined. Raises DataError for conversations without a template."""
        if self.tokenizer.chat_template is not None:
            return ChatTemplate(self.tokenizer)
        if self.data.format == "messages":
            hint = "take the model's -Instruct version, or add a chat_template.jinja to its directory"
            raise DataError("the tokeniser has no chat template", where="data.format=messages", hint=hint)
        return None

    @cached_property
    def _ends(self) -> list[int]:
        """What ends an answer: the last token of an assistant's turn, if it is a special one, and the end of text."""
        if self._chat is None:
            return [self._eos]
        talk = ({"role": "user", "content": "."}, {"role": "assistant", "content": "."})
        ids, is_learned = self._chat.encode(talk, "chat template")[-1]
        last = [token for token, learned in zip(ids, is_learned, strict=True) if learned][-1]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return list(dict.fromkeys([last, self._eos] if last in special else [self._eos]))

    @cached_property
    def _eos(self) -> int:
        """The end-of-text token; also what padding is made of, since nothing ever attends to that."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokeniser has no end-of-text token", hint="name its eos_token in tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)


def _shown(row: Row) -> BadRow:
    return bad_row(row, "few_shot", "its source is one of the examples that stand in every prompt")


def _start_of_answer(labels: Sequence[int] | NDArray[np.int32]) -> int:
    """Where the last run of tokens to learn begins; the end of the row if there is none. `labels` are shifted."""
    learned = np.flatnonzero(np.asarray(labels) != IGNORED)
    if len(learned) == 0:
        return len(labels)
    starts = learned[np.flatnonzero(np.diff(learned, prepend=-2) > 1)]
    return int(starts[-1]) + 1
