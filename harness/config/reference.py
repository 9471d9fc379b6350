"""``python -m harness.config.reference``: docs/configuration.md, written from the schema's descriptions."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.config.messages import sections_of
from harness.config.schema import RunConfig

_TITLE = """# The run file, key by key

Written from the schema by `make docs`; do not edit. `harness schema` prints the same as JSON Schema.

A run file is YAML 1.2: `1e-4` is a number, `no` is the text "no", and a key given twice is an error. Unknown keys are
errors. Paths are relative to the directory the command is run in. Any key can be set on the command line as
`key.path=value`, where the value is YAML: `optimizer.lr=1e-4`, `data.train.0.path=x.tsv`, `evaluation=null`.
"""
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def reference() -> str:
    """The whole page."""
    return _TITLE + "".join(_section("", RunConfig))


def _section(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    yield f"\n## {title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, info in model.model_fields.items():
        cells = (f"`{prefix}{name}`", _type(info.annotation), _default(info), info.description or "")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    for name, info in model.model_fields.items():
        for section in sections_of(info.annotation):
            if (prefix, name) != ("data.", "validation") and (prefix, name) != ("data.", "test"):
                yield from _section(f"{prefix}{name}{'.N' if get_origin(info.annotation) is list else ''}.", section)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES.get(annotation, str(annotation))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
