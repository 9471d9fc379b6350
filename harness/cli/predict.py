"""``harness predict``: texts to labels, as JSON lines."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.common import DTYPES, positive
from harness.cli.translate import decoded, line_blocks

if TYPE_CHECKING:
    from harness.config.schema import DataConfig
    from harness.data.rows import Row

HELP = (
    "Classify texts: one JSON object for each, in order. Lines of standard input are texts; of a model for pairs, two\n"
    "texts parted by a tab. A .tsv, .csv, .jsonl or .parquet file is read by its columns, any other file line by line."
)
EXAMPLE = "harness predict runs/reuters-r8 news.tsv > labels.jsonl"
_ROWS_AT_ONCE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="a classifier's directory, hub name or run directory")
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?", help="texts (default: standard input)")
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: the run's, else text)")
    parser.add_argument("--text-pair-column", metavar="NAME", help="column of the second text")
    parser.add_argument("--max-length", type=positive, metavar="N", help="longest text in tokens (default: the run's)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="batch: rows x longest (default: the run's)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute type (default: that of the stored model)")
    parser.add_argument(
        "--temperature",
        type=_positive_number,
        metavar="T",
        help="divides the logits (default: fitted by the run, else 1)",
    )


def run(args: argparse.Namespace) -> int:
    from harness.training.offline_classifier import open_classifier
    from harness.training.subject import open_subject

    given = {
        "model": {"dtype": args.dtype},
        "data": {name: getattr(args, name) for name in ("text_column", "text_pair_column", "max_length")},
        "batch": {"max_tokens_per_device": args.max_tokens},
    }
    changes = {
        section: {key: value for key, value in values.items() if value is not None} for section, values in given.items()
    }
    subject = open_subject(args.model, changes)
    classifier = open_classifier(subject, args.temperature)
    num_cut = 0
    for rows in row_blocks(args.file, subject.config.data):
        answers = classifier(rows)
        num_cut += sum(answer.truncated for answer in answers)
        sys.stdout.writelines(json.dumps(answer.fields, ensure_ascii=False) + "\n" for answer in answers)
        sys.stdout.flush()
    if num_cut:
        limit = subject.config.data.max_length
        print(f"{num_cut:,} of the texts have more than {limit} tokens: their end was left out", file=sys.stderr)
    return 0


def row_blocks(path: Path | None, data: DataConfig) -> Iterator[list[Row]]:
    """The rows to classify, some at a time. Raises DataError for one that cannot be read."""
    from harness.data.sources import existing_file
    from harness.training.offline_classifier import is_table, table_rows

    if path is not None and is_table(path):
        rows = table_rows(path, data)
        while block := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            yield block
        return
    number = 0
    with existing_file(path).open("rb") if path is not None else sys.stdin.buffer as stream:
        for lines in line_blocks(stream):
            yield [_row(decoded(line, number + place), number + place, data) for place, line in enumerate(lines, 1)]
            number += len(lines)


def _row(line: str, number: int, data: DataConfig) -> Row:
    from harness.data.rows import Row
    from harness.errors import DataError

    where = f"line {number}"
    if data.text_pair_column is None:
        return Row(where, line, "")
    text, tab, second = line.partition("\t")
    if not tab:
        raise DataError("the model reads two texts, parted by a tab", where=where)
    return Row(where, text, "", source_pair=second)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value
