"""`make demo-llm`: QLoRA on a small chat model, its answers before and after, the adapter and a merged model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.demo import ROOT, harness, scores

RUN_FILE = "examples/quickstart-llm.yaml"
MODEL = "runs/models/smollm2-135m-instruct"
INSTRUCTIONS = "runs/data/instructions"
RUN = ROOT / "runs" / "quickstart-llm"
MERGED = RUN / "merged"
NUM_SHOWN = 8


def example(module: str, *arguments: str) -> None:
    """Run another program of this directory; a failure ends the demo with its exit code."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def evaluations() -> tuple[Path, Path]:
    """The first and the last evaluation of the run: before the first step and after the last."""
    found = sorted(RUN.glob("evaluations/step-*-validation"))
    return found[0], found[-1]


def show(before: Path, after: Path) -> None:
    """Instructions spread over the held-out ones, with the reference and the model's answers before and after."""
    files = (after / "sources.txt", after / "references.txt", before / "hypotheses.txt", after / "hypotheses.txt")
    rows = list(zip(*(path.read_text(encoding="utf-8").splitlines() for path in files), strict=True))
    for prompt, reference, first, last in rows[:: max(1, len(rows) // NUM_SHOWN)][:NUM_SHOWN]:
        print(f"\n  prompt     {prompt}\n  reference  {reference}\n  before     {first}\n  after      {last}")


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[part] = time.monotonic() - started


def main() -> None:
    seconds: dict[str, float] = {}
    with timed(seconds, "instructions and model"):
        example("examples.llm.make_instructions", INSTRUCTIONS)
        example("examples.llm.smollm2", MODEL)
    with timed(seconds, "training and both evaluations"):
        harness("train", RUN_FILE)
    with timed(seconds, "merged model"):
        shutil.rmtree(MERGED, ignore_errors=True)  # of an earlier demo
        harness("export", str(RUN.relative_to(ROOT)), str(MERGED.relative_to(ROOT)), "--merge")
    (RUN / "demo.json").write_text(json.dumps(seconds), encoding="utf-8")

    before, after = evaluations()
    show(before, after)
    print("\nHeld-out pages, greedy:")
    for name, directory in (("before", before), ("after", after)):
        values = scores(directory)
        print(f"  {name:<8}loss {values['loss']:5.3f}   chrF {values['chrf']:5.2f}   BLEU {values['bleu']:5.2f}")
    print(f"\nReport page   {after / 'report.html'}\nTensorBoard   tensorboard --logdir {RUN / 'tensorboard'}")
    print(f"Adapter       {RUN / 'export'}\nMerged model  {MERGED}\n")
    for part, value in [*seconds.items(), ("in all", sum(seconds.values()))]:
        print(f"{value:6.0f} s  {part}")


if __name__ == "__main__":
    main()
