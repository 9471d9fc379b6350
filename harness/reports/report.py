"""The directory of one evaluation: texts line by line, scores.json and a page to look at, committed as a whole."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.decoding.beam import BeamSettings
from harness.errors import HarnessError
from harness.io.atomic import fsync_directory, write_json, write_text
from harness.reports.changes import Changes, earlier_evaluation
from harness.reports.checks import find_suspects
from harness.reports.page import render_page
from harness.reports.sentences import Sentences
from harness.scoring.buckets import by_language, by_length
from harness.scoring.scores import Scores
from harness.scoring.significance import WrittenEvaluation
from harness.tasks.task import Output

FILES = {"hypotheses.txt", "sources.txt", "references.txt", "scores.json", "report.html", "nbest.jsonl"}
CLASS_FILES = {"predictions.jsonl", "confusion.tsv"}


def write_evaluation(
    directory: Path,
    sentences: Sentences,
    scores: Scores,
    settings: BeamSettings,
    *,
    decode_seconds: float,
    losses: Mapping[str, float],
    precision: str = "model",
    baseline: WrittenEvaluation | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> None:
    """The files of decoded rows, committed by `write_directory`.

    Line i of the text files is row i. `losses` (loss, nll) are per target token, `precision` is the weights' type,
    `prompt` how a language model was asked. The page compares with `baseline`, an evaluation of the same rows; if none
    is given with that of the last step before, should it lie beside `directory`.
    """
    baseline = baseline or earlier_evaluation(directory, sentences.references)
    changes = Changes.since(baseline, sentences, scores) if baseline else None
    findings = find_suspects(sentences)
    texts = {
        "sources": sentences.sources, "references": sentences.references, "hypotheses": sentences.hypotheses,
    }  # fmt: skip
    summary = {
        **_summary(scores, settings, decode_seconds, losses, num_sentences=len(sentences.hypotheses)),
        "precision": precision,
        **({"prompt": prompt} if prompt else {}),
        "by_length": by_length(**texts, statistics=scores.statistics),
        "by_language": by_language(sentences.pairs, sentences.references, sentences.hypotheses, list(scores.values)),
        "findings": {finding.name: len(finding.rows) for finding in findings},
        **({"baseline": changes.to_json()} if changes else {}),
    }
    files = {f"{name}.txt": "".join(text + "\n" for text in lines) for name, lines in texts.items()}
    files["report.html"] = render_page(directory.name, summary, sentences, findings, changes)
    if settings.num_hypotheses > 1:
        files["nbest.jsonl"] = "".join(map(_nbest_line, range(len(sentences.outputs)), sentences.outputs))
    write_directory(directory, summary, files)


def write_directory(directory: Path, scores: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write scores.json and other files under a temporary name, then rename; an older evaluation is replaced.

    Raises HarnessError if `directory` holds anything that is not an evaluation's, OSError if it cannot be written.
    """
    refuse_other_files(directory)
    for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.tmp")
    try:
        for name, text in files.items():
            write_text(temporary / name, text)
        write_json(temporary / "scores.json", scores)
        _replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_losses(directory: Path, losses: Mapping[str, float], num_rows: int, seconds: float) -> None:
    """scores.json of an evaluation that predicts nothing. Raises as `write_evaluation` does."""
    size = {"sentences": num_rows, "decode_seconds": round(seconds, 3)}
    write_directory(directory, {**finite(losses), "signatures": {}, **size}, {})


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _summary(
    scores: Scores, settings: BeamSettings, decode_seconds: float, losses: Mapping[str, float], *, num_sentences: int
) -> dict[str, Any]:
    """scores.json: the values under the same names as in metrics.jsonl (not finite: null), and what they depend on."""
    return {
        **scores.values,
        **finite(losses),
        "signatures": scores.signatures,
        "details": scores.details,
        "confidence": scores.confidence,
        "target_language": scores.target_language,
        "sentences": num_sentences,
        "decode_seconds": round(decode_seconds, 3),
        "beam": asdict(settings),
        "hypothesis_score": settings.formula,
    }


def _nbest_line(row: int, outputs: Sequence[Output]) -> str:
    best = [{"text": one.text, **finite({"score": one.score})} for one in outputs]
    return json.dumps({"row": row, "outputs": best}, ensure_ascii=False) + "\n"


def refuse_other_files(directory: Path) -> None:
    """Raises HarnessError if `directory` holds anything that is not an evaluation's."""
    if directory.exists() and not directory.is_dir():
        raise HarnessError("a file is in the way of the directory", where=str(directory), hint="name another one")
    present = {path.name for path in directory.iterdir()} if directory.exists() else set()
    foreign = sorted(present - FILES - CLASS_FILES)
    if foreign:
        raise HarnessError(
            f"the directory holds files that are not an evaluation's: {', '.join(foreign[:5])}",
            where=str(directory),
            hint="name a new or empty directory",
        )


def _replace(temporary: Path, directory: Path) -> None:
    """Rename `temporary` to `directory`; no directory can be renamed over a full one, so the old one steps aside."""
    if directory.exists():
        old = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.tmp")
        directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old)
    else:
        temporary.rename(directory)
    fsync_directory(directory.parent)
