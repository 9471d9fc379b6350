"""``harness evaluate``: decode a set of rows with beam search, and score it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.cli.common import add_model_options, model_changes, positive

HELP = (
    "Decode a test set with beam search and score it with sacreBLEU, as training does: for a run, without further\n"
    "options, the same numbers on the same rows (its test set, else its validation set)."
)
EXAMPLE = "harness evaluate runs/enro --beam-size 6 --metrics bleu,chrf,ter"
FORMATS = ("pairs", "text", "prompt", "messages", "labelled")
METRICS = ("bleu", "chrf", "ter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--data", metavar="FILE", help=".tsv .csv .jsonl .parquet, or sources line by line")
    parser.add_argument("--references", metavar="FILE", help="the target side line by line, if --data is plain text")
    parser.add_argument(
        "--format", choices=FORMATS, help="what a row of --data holds (default: the run's, or messages)"
    )
    parser.add_argument("--metrics", type=_metrics, metavar="A,B", help="of bleu, chrf, ter (default bleu,chrf)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where hypotheses, scores and page are written")
    parser.add_argument("--processes", type=positive, default=1, metavar="N", help="ranks on this machine (default 1)")


def run(args: argparse.Namespace) -> int:
    from harness.errors import ConfigError
    from harness.io.atomic import read_json
    from harness.training.offline import named_set, open_subject, score

    if args.references and not args.data:
        raise ConfigError("is the other side of --data", where="--references", hint="give both, or neither")
    changes = model_changes(args)
    if args.format:
        changes["data"]["format"] = args.format
    if args.metrics:
        changes["evaluation"]["metrics"] = args.metrics
    subject = open_subject(args.model, changes)
    name, source, num_rows = _given_set(args) if args.data else named_set(subject)
    assert subject.config.evaluation is not None
    directory = args.output or _default_output(subject, f"{name}-beam{subject.config.evaluation.beam_size}")
    code = score(subject, name, source, directory, num_rows=num_rows, processes=args.processes)
    if code == 0:
        print(describe(subject.name, directory, read_json(directory / "scores.json")))
    return code


def describe(model: str, directory: Path, scores: dict[str, Any]) -> str:
    """The scores of an evaluation with what must be told with them."""
    from harness.evaluation.scores import LABELS

    lines = [f"{model}: {scores['sentences']:,} rows in {scores['decode_seconds']:.1f} s"]
    if beam := scores.get("beam"):
        search = f"beam {beam['beam_size']}, length penalty {beam['length_penalty']:g}"
        lines[0] += f"; {search}, at most {beam['max_length']} tokens"
    for name, label in LABELS.items():
        if name in scores:
            value = "not finite" if scores[name] is None else f"{scores[name]:.{2 if name in METRICS else 4}f}"
            lines.append(f"{label:<8} {value:>10}  {scores['signatures'].get(name, '')}".rstrip())
    files = ", ".join(sorted(path.name for path in directory.iterdir()))
    return "\n".join([*lines, f"{files} are in {directory}"])


def _given_set(args: argparse.Namespace) -> tuple[str, Any, None]:
    from harness.config.schema import DataSource

    source = DataSource(source=args.data, target=args.references) if args.references else DataSource(path=args.data)
    return Path(args.data).name.partition(".")[0], source, None


def _default_output(subject: Any, name: str) -> Path:
    """Beside the evaluations of the run, under a name that training does not use; else in the current directory."""
    if subject.run_dir is not None:
        return Path(subject.run_dir) / "evaluations" / f"step-{subject.step:08d}-{name}"
    return Path("evaluations") / f"{subject.name}-{name}"


def _metrics(text: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",")]
    if wrong := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(METRICS)}")
    return list(dict.fromkeys(names))
