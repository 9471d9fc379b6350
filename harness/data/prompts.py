"""Pairs as a language model is asked for them: a prompt, and the translation that follows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from harness.config.prompt_rules import names_in
from harness.config.schema import DataConfig, DataSource, FewShotConfig
from harness.data.leakage import row_source_digest
from harness.data.rows import Row
from harness.data.sources import read_rows
from harness.errors import DataError


@dataclass(frozen=True)
class PairPrompts:
    """`examples` stand in every prompt where `template` says {examples}, else before it; `shown` are their sources."""

    template: str
    examples: str = ""
    shown: frozenset[bytes] = frozenset()

    def written(self, row: Row) -> Row:
        """The pair as a prompt and its completion, and as the two turns of a conversation.

        Prompt and completion are to be joined as they stand: white space between them belongs to the completion, since
        most tokenisers join it with the word after it. Raises DataError if the prompt names a language the row lacks.
        """
        prompt = _filled(self.template, row, examples=self.examples)
        if "examples" not in names_in(self.template):
            prompt = self.examples + prompt
        prompt, answer = prompt.rstrip(" "), row.target.strip()
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        space = "" if prompt.endswith("\n") else " "
        return replace(row, source=prompt, target=space + answer, messages=turns)

    def shows(self, row: Row) -> bool:
        """Whether the row's source is one of the examples: its answer would stand in its prompt."""
        return row_source_digest(row) in self.shown


def pair_prompts(data: DataConfig) -> PairPrompts:
    """The prompts of `data.prompt_template` and `data.few_shot`. Raises DataError if examples cannot be read."""
    assert data.prompt_template is not None, "the default of format pairs with task causal_lm"
    if data.few_shot is None:
        return PairPrompts(data.prompt_template)
    rows = _examples(data.few_shot, data)
    examples = "".join(_filled(data.few_shot.template, row, target=row.target) for row in rows)
    return PairPrompts(data.prompt_template, examples, frozenset(map(row_source_digest, rows)))


def _examples(few_shot: FewShotConfig, data: DataConfig) -> list[Row]:
    rows = (row for row in read_rows(DataSource(path=few_shot.path), data) if isinstance(row, Row))
    first = list(islice(rows, few_shot.examples))
    if len(first) < few_shot.examples:
        what = f"{len(first)} rows can be read, and each prompt shall have {few_shot.examples}"
        raise DataError(what, where=few_shot.path, hint=f"data.few_shot.examples={len(first)}")
    return first


def _filled(template: str, row: Row, **values: str) -> str:
    for name in names_in(template) - values.keys():
        value = getattr(row, name)
        if value is None:
            what = f"the prompt says {{{name}}}, and {row.where or 'the text'} names none"
            raise DataError(what, where=f"data.{name}", hint=f"name it as the model shall read it: data.{name}=German")
        values[name] = value
    return template.format_map(values)
