"""Templates of prompts: their names, in Python's format syntax ({{ is a brace), and what is wrong with them."""

from __future__ import annotations

import string
from collections.abc import Iterator

from harness.config.deepspeed import Problem
from harness.config.schema import RunConfig

_SIDES = ("source", "source_language", "target_language")


def names_in(template: str) -> set[str]:
    """What stands in braces, all of it. Raises ValueError for a lonely brace."""
    parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    return {f"{name}{'!' if how else ''}{how or ''}{':' if width else ''}{width}" for _, name, width, how in parts}


def prompt_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the templates and stop strings of a language model's answers."""
    data, evaluation = config.data, config.evaluation
    if data.prompt_template is not None:
        key = "data.prompt_template"
        yield from _template(key, data.prompt_template, needed=("source",), known=(*_SIDES, "examples"))
    if data.few_shot is not None:
        key = "data.few_shot.template"
        yield from _template(key, data.few_shot.template, needed=("source", "target"), known=(*_SIDES, "target"))
    if evaluation is not None and "" in evaluation.stop_strings:
        yield "evaluation.stop_strings", "an empty text would end every answer: remove it"


def _template(key: str, template: str, *, needed: tuple[str, ...], known: tuple[str, ...]) -> Iterator[Problem]:
    try:
        names = names_in(template)
    except ValueError as error:
        yield key, f"cannot be read ({error}): a brace that is text is written twice, {{{{ or }}}}"
        return
    if unknown := sorted(names - set(known)):
        every = ", ".join(f"{{{name}}}" for name in known)
        yield key, f"{{{unknown[0]}}} is no name of a template: use {every}; write a brace that is text twice"
    elif missing := [name for name in needed if name not in names]:
        yield key, f"has no {{{missing[0]}}}: write it where the text shall stand"
