"""The house rules of docs/architecture.md: floors, who may import which heavy library, and the size of files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "harness"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "errors": 0, "io": 0, "config": 0, "plan": 0,
    "data": 1, "models": 1, "objectives": 1, "scoring": 1,
    "tasks": 2, "decoding": 2, "engine": 2,
    "evaluation": 3, "reports": 3, "checkpoint": 3,
    "launch": 4, "cluster": 4, "training": 4,
    "cli": 5,
}  # fmt: skip

# Rooms of one floor that may import each other, in this direction only.
NEIGHBOURS = {
    ("io", "errors"),
    ("config", "errors"),
    ("config", "io"),
    ("plan", "errors"),
    ("plan", "io"),
    ("plan", "config"),
    ("evaluation", "reports"),
    ("cluster", "launch"),
    ("training", "launch"),
    ("training", "cluster"),
}

# Heavy library -> the rooms that may import it.
IMPORTERS = {
    "deepspeed": {"engine", "checkpoint"},
    "transformers": {"models", "tasks"},
    "sentencepiece": {"models"},
    "tokenizers": {"models"},
    "peft": {"models"},
    "bitsandbytes": {"models", "engine"},
    "datasets": {"data"},
    "tensorboard": {"training"},
    "sacrebleu": {"scoring"},
    "PIL": {"reports"},
}

# Rooms that answer in under a second: no torch (or what imports it) when they are imported.
WITHOUT_TORCH = {"errors", "io", "config", "plan", "launch", "cluster", "cli"}
HEAVY = {"torch", "accelerate", *IMPORTERS} - {"sacrebleu", "sentencepiece"}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
# Longer where a cut would make the code worse: "room/file.py" or "room/file.py:function" -> (lines, why).
LONGER: dict[str, tuple[int, str]] = {}


class Import(NamedTuple):
    """One imported module; ``at_import``: it is imported as soon as the file is."""

    file: Path
    line: int
    module: str
    at_import: bool

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line}"


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lazy = {id(inner) for node in ast.walk(tree) if is_lazy(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) not in lazy)


def is_lazy(node: ast.AST) -> bool:
    """A function body, or a block only type checkers read."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "harness" and len(parts) > 1 and parts[1] in FLOORS else None


ALL_IMPORTS = [one for file in FILES if room(file) in FLOORS for one in imports(file)]


def test_every_file_stands_in_a_known_room() -> None:
    assert {room(file) for file in FILES} - {"__init__", "__main__"} <= set(FLOORS)


def test_imports_run_downwards() -> None:
    wrong = []
    for one in ALL_IMPORTS:
        ours, theirs = room(one.file), room_of_module(one.module)
        if theirs is None or ours == theirs or FLOORS[theirs] < FLOORS[ours] or (ours, theirs) in NEIGHBOURS:
            continue
        wrong.append(f"{one.place}: {ours} imports {one.module}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_have_named_importers() -> None:
    wrong = [
        f"{one.place}: {one.module}"
        for one in ALL_IMPORTS
        if room(one.file) not in IMPORTERS.get(heavy_name(one.module), {room(one.file)})
    ]
    assert not wrong, "\n".join(wrong)


def heavy_name(module: str) -> str:
    if module.startswith("torch.utils.tensorboard"):
        return "tensorboard"
    return module.partition(".")[0]


def test_quick_rooms_import_no_torch_at_module_level() -> None:
    wrong = [
        f"{one.place}: {one.module}"
        for one in ALL_IMPORTS
        if room(one.file) in WITHOUT_TORCH and one.at_import and one.module.partition(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_quick_rooms_import_no_slow_room_at_module_level() -> None:
    wrong = [
        f"{one.place}: {one.module}"
        for one in ALL_IMPORTS
        if room(one.file) in WITHOUT_TORCH
        and one.at_import
        and room_of_module(one.module) not in (None, *WITHOUT_TORCH)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short(file: Path) -> None:
    name, text = str(file.relative_to(PACKAGE)), file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGER.get(name, (MAX_FILE_LINES, ""))[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = LONGER.get(f"{name}:{node.name}", (MAX_FUNCTION_LINES, ""))[0]
            assert length <= limit, f"{name}:{node.lineno}: {node.name} has {length} lines"


def test_exceptions_are_still_needed() -> None:
    for name in LONGER:
        assert (PACKAGE / name.partition(":")[0]).is_file(), name
