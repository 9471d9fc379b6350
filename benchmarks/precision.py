"""Scores and seconds of float32, bfloat16 and int8: beam 5 on the 271 held-out rows of examples/data, one thread.

`python -m benchmarks.precision [rows]`. The model is examples/base. `changed` are outputs that differ from float32's.
"""

from __future__ import annotations

import csv
import gzip
import sys
import time
from typing import Any

import torch

from benchmarks.record import write_result
from examples.demo import BASE, ROOT, TEST
from harness.data.rows import Row
from harness.scoring.scores import corpus_scores
from harness.training.offline import open_translator
from harness.training.subject import open_subject

NUM_WARM_UP = 8


def main() -> None:
    torch.set_num_threads(1)
    rows = held_out_rows()[: int(sys.argv[1]) if len(sys.argv) > 1 else None]
    references = [row.target for row in rows]
    values: dict[str, Any] = {"sentences": len(rows), "beam_size": 5}
    float32: list[str] = []
    for precision in ("model", "bfloat16", "int8"):
        changes = {
            "model": {"dtype": "float32"},
            "data": {"source_language": "en_XX", "target_language": "de_DE", "max_target_length": 128},
            "evaluation": {"max_length_ratio": 1.5, "precision": precision},
        }
        translator = open_translator(open_subject(str(ROOT / BASE), changes))
        translator.of_rows(rows[:NUM_WARM_UP])
        wall, cpu = time.monotonic(), time.process_time()
        texts = [one.outputs[0].text for one in translator.of_rows(rows)]
        seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
        float32 = float32 or texts
        scores = corpus_scores(texts, references, ["bleu", "chrf"], target_language="de_DE", bootstrap_samples=0)
        values["float32" if precision == "model" else precision] = {
            **{name: round(value, 2) for name, value in scores.values.items()},
            "changed": sum(text != first for text, first in zip(texts, float32, strict=True)),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
        }
    command = " ".join(["python -m benchmarks.precision", *sys.argv[1:]])
    write_result("precision", command, values)


def held_out_rows() -> list[Row]:
    with gzip.open(ROOT / TEST, "rt", encoding="utf-8") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Row("", line["source"], line["target"], "en_XX", "de_DE") for line in lines]


if __name__ == "__main__":
    main()
