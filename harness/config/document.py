"""A YAML 1.2 file as plain values, with the line of every key.

YAML 1.2 through ruamel.yaml: ``1e-4`` is a number and ``no`` is Norwegian; a key given twice is a mistake.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from harness.errors import ConfigError

_MERGE_TAG = "tag:yaml.org,2002:merge"
_MAX_NODES = 20_000
_MAX_DEPTH = 50
KeyPath = tuple[str, ...]


@dataclass
class Document:
    """A parsed run file. ``places``: for each key path its line, or the override that set it."""

    path: Path
    value: dict[str, Any]
    places: dict[KeyPath, int | str] = field(default_factory=dict)
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def place(self, key: KeyPath) -> int | str:
        """Line or override of ``key``, or of the closest section around it (line 1 if none is known)."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return 1

    def replaced(self, key: KeyPath, by: str) -> None:
        """Note that an override set ``key``: the lines of what stood there no longer count."""
        self.places = {path: place for path, place in self.places.items() if path[: len(key)] != key}
        self.places[key] = by


def read_document(path: Path) -> Document:
    """Parse a run file; duplicate keys are collected in ``mistakes``. Raises ConfigError if it is no YAML mapping."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the run file: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError("the run file is not UTF-8: save it as UTF-8", where=f"{path}:{line}") from error
    node, value = _parse(text, str(path))
    if value is None:
        raise ConfigError("the run file is empty", where=str(path), hint="start from one of examples/")
    if not isinstance(value, dict):
        raise ConfigError("the run file must be a mapping: lines of `key: value`", where=f"{path}:1")
    document = Document(path, value)
    _Walk(document).visit(node, ())
    return document


def parse_value(text: str) -> Any:
    """A YAML value from the command line. Raises ConfigError."""
    return _parse(text, "")[1]


def _parse(text: str, name: str) -> tuple[Node | None, Any]:
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True
    try:
        node = yaml.compose(io.StringIO(text))
        value = None if node is None else yaml.constructor.construct_document(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if name and mark else name
        raise ConfigError(f"not YAML: {_reason(error)}", where=where) from error
    except (YAMLError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"not YAML: {reason}", where=name) from error
    return node, value


def _reason(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "syntax error")
    if "cannot start any token" in problem and "\\t" in problem:
        return "a tab: indent with spaces"
    if "could not determine a constructor" in problem:
        tag = re.search(r"'(.*)'", problem)
        return f"the tag {tag.group(1) if tag else ''} is not allowed: a run file holds plain values only"
    return problem


class _Walk:
    """Notes the line of every key and each key that is given twice."""

    def __init__(self, document: Document) -> None:
        self.document, self.num_nodes = document, 0

    def visit(self, node: Node | None, path: KeyPath) -> None:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise ConfigError("the run file is too large or its anchors hold themselves", where=str(self.document.path))
        if isinstance(node, MappingNode):
            self._visit_mapping(node, path)
        elif isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                self._note((*path, str(index)), item)
                self.visit(item, (*path, str(index)))

    def _visit_mapping(self, node: MappingNode, path: KeyPath) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                self.visit(value, path)
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                full_name = ".".join((*path, name))
                self.document.mistakes.append((line, f"{full_name}: given twice, first in line {seen[name]}"))
            seen[name] = line
            self._note((*path, name), key)
            self.visit(value, (*path, name))

    def _note(self, path: KeyPath, node: Node) -> None:
        self.document.places[path] = node.start_mark.line + 1
