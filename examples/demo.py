"""`make demo`: fine-tune the shipped base on real pairs, score both with beam search, show ten translations."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN_FILE = "examples/quickstart.yaml"
BASE = "examples/base"
TEST = "examples/data/libreoffice-help.en-de.test.tsv.gz"
RUN = ROOT / "runs" / "quickstart"
BASE_SCORES = RUN / "evaluations" / "base-test"


def harness(*arguments: str) -> None:
    """Run the command as a user would; a failure ends the demo with its exit code."""
    print(f"\n$ harness {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "harness", *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def scores(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
    return content


def show(base: Path, tuned: Path) -> None:
    """Ten translations spread over the test pages, beside source, reference and what the base made of them."""
    names = ("sources.txt", "references.txt")
    columns = [(tuned / name).read_text(encoding="utf-8").splitlines() for name in names]
    columns += [(path / "hypotheses.txt").read_text(encoding="utf-8").splitlines() for path in (base, tuned)]
    rows = list(zip(*columns, strict=True))
    for source, reference, before, after in rows[:: max(1, len(rows) // 10)][:10]:
        print(f"\n  source     {source}\n  reference  {reference}\n  base       {before}\n  fine-tuned {after}")


def main() -> None:
    started = time.monotonic()
    harness("train", RUN_FILE)
    harness(
        "evaluate", BASE, "--data", TEST, "--source-language", "en_XX", "--target-language", "de_DE",
        "--max-length", "128", "--max-length-ratio", "1.5", "--max-tokens", "4096",
        "--processes", "2", "--output", str(BASE_SCORES),
    )  # fmt: skip
    (tuned,) = RUN.glob("evaluations/step-*-test")
    show(BASE_SCORES, tuned)
    print("\nHeld-out pages, beam 5:")
    for name, directory in (("base", BASE_SCORES), ("fine-tuned", tuned)):
        values = scores(directory)
        print(f"  {name:<11}BLEU {values['bleu']:5.2f}   chrF {values['chrf']:5.2f}")
    print(f"\nReport page   {tuned / 'report.html'}\nTensorBoard   tensorboard --logdir {RUN / 'tensorboard'}")
    print(f"Model         {RUN / 'export'}\nSeconds       {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
