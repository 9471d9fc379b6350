"""``harness translate``: standard input to standard output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from harness.cli.common import add_model_options, model_changes, positive

HELP = (
    "Translate standard input line by line: output line i is input line i, an empty line stays empty. Lines are\n"
    "translated as they come, together where many are waiting."
)
EXAMPLE = "harness translate runs/enro < input.en > output.ro"
_BLOCK_BYTES = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--n-best",
        type=positive,
        metavar="N",
        help="the N best outputs of each line, as: line number, score, text (TSV)",
    )
    parser.add_argument(
        "--constraints",
        action="store_true",
        help="a line is: source TAB phrase TAB phrase; its outputs have the phrases",
    )


def run(args: argparse.Namespace) -> int:
    from harness.training.offline import open_translator
    from harness.training.subject import open_ensemble

    changes = model_changes(args)
    if not (Path(args.model) / "plan.json").is_file():
        changes["data"]["format"] = "pairs"  # of a language model that no run says more of
    changes["evaluation"]["num_hypotheses"] = args.n_best or 1
    if args.constraints:
        changes["data"]["constraints_column"] = "constraints"
    subject = open_ensemble(args.model, args.ensemble, changes, args.overrides)
    translator = open_translator(subject)
    data = subject.config.data
    longer = f"has more than {data.max_source_length}"
    if subject.config.task == "causal_lm":
        longer = f"makes a prompt of more than {data.max_length}"
    number = 0
    for lines in line_blocks(sys.stdin.buffer):
        texts = [decoded(line, number + place) for place, line in enumerate(lines, start=1)]
        for result in translator(texts, number, with_phrases=args.constraints):
            number += 1
            if result.truncated:
                print(f"line {number} {longer} tokens: its end was left out", file=sys.stderr)
            sys.stdout.buffer.write(shown(result, number, as_table=args.n_best is not None).encode())
        sys.stdout.buffer.flush()
    return 0


def line_blocks(stream: BinaryIO) -> Iterator[list[bytes]]:
    """The lines of a stream as they arrive: those that are complete in what can be read at once."""
    rest = b""
    while block := stream.read1(_BLOCK_BYTES):  # type: ignore[attr-defined]
        *lines, rest = (rest + block).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def decoded(line: bytes, number: int) -> str:
    """The text of line `number`, counted from 1. Raises DataError if it is not UTF-8."""
    from harness.errors import DataError

    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        where, hint = f"standard input:{number}", "convert the input first, for example with iconv"
        raise DataError(f"not UTF-8 at byte {error.start + 1} of the line", where=where, hint=hint) from error


def shown(result: Any, number: int, *, as_table: bool) -> str:
    """Output lines of one input line."""
    if not as_table:
        return f"{result.outputs[0].text if result.outputs else ''}\n"
    lines = [f"{number}\t{output.score:.4f}\t{output.text}\n" for output in result.outputs]
    return "".join(lines) or f"{number}\t\t\n"
