"""``harness evaluate``: decode a set of rows with beam search, and score it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.common import add_model_options, model_changes, positive

if TYPE_CHECKING:
    from harness.config.evaluation_schema import EvaluationConfig

HELP = (
    "Decode a test set with beam search and score it with sacreBLEU, as training does: for a run, without further\n"
    "options, the same numbers on the same rows (its test set, else its validation set)."
)
EXAMPLE = "harness evaluate runs/enro --beam-size 6 --metrics bleu,chrf,ter evaluation.no_repeat_ngram=3"
FORMATS = ("pairs", "text", "prompt", "messages", "labelled")
METRICS = ("bleu", "chrf", "chrf++", "ter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--data", metavar="FILE", help=".tsv .csv .jsonl .parquet, or sources line by line")
    parser.add_argument("--references", metavar="FILE", help="the target side line by line, if --data is plain text")
    parser.add_argument(
        "--format", choices=FORMATS, help="what a row of --data holds (default: the run's, or messages)"
    )
    parser.add_argument("--metrics", type=_metrics, metavar="A,B", help="of bleu, chrf, chrf++, ter (bleu,chrf)")
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="an evaluation of the same rows, which the page compares with"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where hypotheses, scores and page are written")
    parser.add_argument("--processes", type=positive, default=1, metavar="N", help="ranks on this machine (default 1)")
    parser.add_argument(
        "--invariance",
        action="store_true",
        help="instead of scores: decode in several batchings on one rank and show each output that changes",
    )


def run(args: argparse.Namespace) -> int:
    from harness.errors import ConfigError
    from harness.io.atomic import read_json
    from harness.training.invariance import check_invariance
    from harness.training.offline import score
    from harness.training.subject import named_set, open_ensemble

    if args.references and not args.data:
        raise ConfigError("is the other side of --data", where="--references", hint="give both, or neither")
    changes = model_changes(args)
    if args.format:
        changes["data"]["format"] = args.format
    if args.metrics:
        changes["evaluation"]["metrics"] = args.metrics
    subject = open_ensemble(args.model, args.ensemble, changes, args.overrides)
    name, source, num_rows = _given_set(args) if args.data else named_set(subject)
    assert subject.config.evaluation is not None
    directory = args.output or _default_output(subject, f"{name}-{_short(subject.config.evaluation, args.ensemble)}")
    if args.invariance:
        return check_invariance(subject, name, source, directory, num_rows=num_rows)
    code = score(subject, name, source, directory, num_rows=num_rows, processes=args.processes, baseline=args.baseline)
    if code == 0:
        print(describe(subject.name, directory, read_json(directory / "scores.json")))
    return code


def describe(model: str, directory: Path, scores: dict[str, Any]) -> str:
    """The scores of an evaluation with what must be told with them."""
    from harness.scoring.scores import LABELS

    lines = [f"{model}: {scores['sentences']:,} rows in {scores['decode_seconds']:.1f} s"]
    if beam := scores.get("beam"):
        lines[0] += f"; {_search(beam)}, at most {beam['max_length']} tokens"
    confidence = scores.get("confidence", {})
    for name, label in LABELS.items():
        if name in scores:
            value = "not finite" if scores[name] is None else f"{scores[name]:.{2 if name in METRICS else 4}f}"
            interval = "  ({:.2f} to {:.2f})".format(*confidence[name]) if name in confidence else ""
            lines.append(f"{label:<8} {value:>10}{interval}  {scores['signatures'].get(name, '')}".rstrip())
    files = ", ".join(sorted(path.name for path in directory.iterdir()))
    return "\n".join([*lines, f"{files} are in {directory}"])


def _search(beam: dict[str, Any]) -> str:
    """The settings of scores.json in words."""
    if risk := beam["minimum_risk"]:
        return f"minimum risk by {risk['utility']} of {risk['samples']} samples"
    if drawn := beam["sampling"]:
        return f"drawn at temperature {drawn['temperature']:g}, top-k {drawn['top_k']}, top-p {drawn['top_p']:g}"
    groups = f" in {beam['beam_groups']} groups" if beam["beam_groups"] > 1 else ""
    return f"{beam['preset']} beam {beam['beam_size']}{groups}, length penalty {beam['length_penalty']:g}"


def _short(options: EvaluationConfig, others: list[str]) -> str:
    """A name of the search for a directory."""
    if options.draws:
        name = f"risk-{options.minimum_risk.utility}" if options.minimum_risk else "sampled"
    else:
        name = f"beam{options.beam_size}" if options.preset == "hf" else f"{options.preset}-beam{options.beam_size}"
    return f"{name}-of-{1 + len(others)}" if others else name


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
