"""`harness tokenizer train`: a sentencepiece tokeniser for a model family from the user's text."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train a tokeniser for a model family on your text"
EXAMPLE = (
    "harness tokenizer train --family mbart --vocab-size 8000 --input pairs.tsv.gz:source,target --output my-tokenizer"
)
FAMILIES = ("mbart", "mbart50", "nllb", "m2m100", "marian", "t5")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's one action and its options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train")
    train = actions.add_parser("train", help=HELP, description=HELP, epilog=f"example: {EXAMPLE}")
    train.add_argument("--family", choices=FAMILIES, required=True, help="whose special tokens and language tags")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids, tags counted")
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text.txt or table.tsv:column,column (.gz too); name a file twice to give it double weight",
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the tokeniser")
    train.add_argument(
        "--character-coverage", type=float, default=1.0, metavar="C", help="share of the characters kept (default 1.0)"
    )
    train.add_argument(
        "--max-sentences", type=int, default=5_000_000, metavar="N", help="size of the random sample of the text"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, writes, says what was written. Raises ConfigError and DataError."""
    from harness.models.tokenizer import TextInput, train_tokenizer

    tokenizer = train_tokenizer(
        args.family,
        [TextInput.parse(text) for text in args.input],
        args.output,
        vocab_size=args.vocab_size,
        character_coverage=args.character_coverage,
        max_sentences=args.max_sentences,
    )
    print(f"{type(tokenizer).__name__} with {args.vocab_size} ids in {args.output}")
    return 0
