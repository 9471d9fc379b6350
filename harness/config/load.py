"""Read a run file: YAML 1.2, command line overrides, types and contradictions, with every error at once.

Each error names its place (``file:line``, or the override), the key and what to do. Paths in a run file are relative
to the current directory, as on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.config import messages
from harness.config.document import Document, parse_value, read_document
from harness.config.evaluation_schema import forget_search_of_preset
from harness.config.prompt_rules import prompt_problems
from harness.config.rules import contradictions
from harness.config.schema import RunConfig
from harness.config.search_rules import search_problems
from harness.config.task_rules import foreign_keys, metric_problems
from harness.errors import ConfigError
from harness.io.accelerator import Accelerator
from harness.io.accelerator import accelerator as this_accelerator


@dataclass(frozen=True, order=True)
class Mistake:
    """One error of the user's: sorted by line, overrides last."""

    line: int
    where: str
    text: str


_AFTER_EVERY_LINE = 10**9


def load_run_config(path: Path, overrides: Sequence[str] = (), *, accelerator: Accelerator | None = None) -> RunConfig:
    """The checked run file, with ``overrides`` (``key.path=YAML value``) applied in order.

    ``accelerator``: what the run will train on; default: what this machine has. Raises ConfigError.
    """
    document = read_document(path)
    mistakes = [Mistake(line, f"{path}:{line}", text) for line, text in document.mistakes]
    for override in overrides:
        if complaint := apply_override(document, override):
            mistakes.append(Mistake(_AFTER_EVERY_LINE, _named(override), complaint))
    try:
        config = RunConfig.model_validate(document.value)
    except ValidationError as error:
        found = messages.explain(error, document.value)
        raise _error(path, [*mistakes, *(_mistake(document, key, text) for key, text in found)]) from error
    problems = contradictions(config, accelerator or this_accelerator())
    mistakes += [_mistake(document, tuple(key.split(".")), text) for key, text in problems]
    if mistakes:
        raise _error(path, mistakes)
    return config


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with ``overrides`` of `evaluation` and `data`, for the commands that decode.

    A preset brings its own beams and length penalty. Raises ConfigError, also for a search that ``config`` itself asks
    for and that cannot be.
    """
    document = Document(Path(config.name), config.model_dump(mode="json"))
    mistakes = []
    for override in overrides:
        complaint: str | None = "only keys of evaluation and data count here, like evaluation.beam_size=6"
        if override.startswith(("evaluation.", "data.")):
            if override.startswith("evaluation.preset="):
                forget_search_of_preset(document.value["evaluation"])
            complaint = apply_override(document, override)
        if complaint:
            mistakes.append(Mistake(_AFTER_EVERY_LINE, _named(override), complaint))
    if mistakes:
        raise _error(document.path, mistakes)
    try:
        changed = RunConfig.model_validate(document.value)
        named = {override.partition("=")[0] for override in overrides}
        foreign = (problem for problem in foreign_keys(changed) if problem[0] in named)
        problems = (*foreign, *metric_problems(changed), *search_problems(changed), *prompt_problems(changed))
        found = [(tuple(key.split(".")), text) for key, text in problems]
    except ValidationError as error:
        found = messages.explain(error, document.value)
    if found:
        places = [place if isinstance(place := document.place(key), str) else config.name for key, _ in found]
        wrong = zip(places, found, strict=True)
        raise _error(document.path, [Mistake(0, place, f"{'.'.join(key)}: {text}") for place, (key, text) in wrong])
    return changed


def apply_override(document: Document, override: str) -> str | None:
    """Set one ``key.path=value`` in the document; returns what is wrong with it, or None."""
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        return "must have the form key.path=value, like optimizer.lr=1e-4"
    try:
        value = parse_value(text)
    except ConfigError as error:
        return f"the value is {error.what}"
    node: Any = document.value
    place: tuple[str, ...] = ()
    for depth, key in enumerate(keys):
        place = (*place, key)
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                return f"{'.'.join(place[:-1])} has {len(node)} entries, numbered from 0: there is no '{key}'"
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            return f"{'.'.join(place[:-1])} is {messages.shown(node)}, not a section"
        if depth + 1 == len(keys):
            node[index] = value
        elif node[index] is None if isinstance(node, list) else node.get(index) is None:
            node[index] = {}
            document.replaced(place, _named(override))
        node = node[index]
    document.replaced(place, _named(override))
    return None


def _named(override: str) -> str:
    name, equals, value = override.partition("=")
    return f"override '{name}{equals}{value if len(value) <= 40 else value[:37] + '...'}'"


def _mistake(document: Document, key: tuple[str, ...], text: str) -> Mistake:
    place = document.place(key)
    line = place if isinstance(place, int) else _AFTER_EVERY_LINE
    where = f"{document.path}:{place}" if isinstance(place, int) else place
    return Mistake(line, where, f"{'.'.join(key)}: {text}" if key else text)


def _error(path: Path, mistakes: list[Mistake]) -> ConfigError:
    ordered = sorted(set(mistakes))
    if len(ordered) == 1:
        return ConfigError(ordered[0].text, where=ordered[0].where)
    lines = "".join(f"\n  {mistake.where}: {mistake.text}" for mistake in ordered)
    return ConfigError(f"{len(ordered)} errors{lines}", where=str(path))
