"""Beam search of ours against Hugging Face `generate`, one thread, float32, on sentences of examples/data as they come.

`python -m benchmarks.decoding [sentences] [max_tokens]`. `generate` gets the sentences in the order of the file, and
sorted by length in batches of the same size as ours.
"""

from __future__ import annotations

import csv
import gzip
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from benchmarks.record import write_result
from harness.config.schema import DataConfig, LossConfig
from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, decode, decoding_batches
from harness.models.families import MBART
from harness.models.load import load_tokenizer
from harness.tasks.translation import TranslationTask

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = BeamSettings(beam_size=5, length_penalty=1.0, max_length=128)
FILE_ORDER_ROWS = 16


def main() -> None:
    num_sentences, max_tokens = (int(value) for value in (*sys.argv[1:3], *("200", "4096")[len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(EXAMPLES / "base", dtype=torch.float32).eval()
    model.generation_config.forced_eos_token_id = None
    data = DataConfig.model_validate({"train": [{"path": ""}], "max_source_length": 128})
    task = TranslationTask(load_tokenizer(str(EXAMPLES / "base")), MBART, data, LossConfig())
    encoded = task.encode([Row("", text, "", "en_XX", "de_DE") for text in sentences(num_sentences)])
    examples = [(one.input_ids, one.labels, one.marker) for one in encoded]
    sizes = [len(one.input_ids) for one in encoded]
    device = torch.device("cpu")

    def collate(rows: list[int]) -> dict[str, Any]:
        return task.collate_sources([examples[row] for row in rows], device)

    sorted_batches = decoding_batches(sizes, beam_size=SETTINGS.beam_size, max_tokens=max_tokens)
    all_rows = list(range(num_sentences))
    file_order = [all_rows[start : start + FILE_ORDER_ROWS] for start in range(0, num_sentences, FILE_ORDER_ROWS)]
    generate(model, collate, file_order[:1])  # warm up
    started = time.process_time()
    found = decode(model, sizes, collate, settings=SETTINGS, max_tokens=max_tokens)
    ours_s = time.process_time() - started
    assert found is not None
    ours = [found[row][0].token_ids for row in all_rows]
    values: dict[str, Any] = {"sentences": num_sentences, "max_tokens": max_tokens, "ours_cpu_s": round(ours_s, 2)}
    values["output_tokens_per_cpu_s"] = round(sum(map(len, ours)) / ours_s)
    for name, batches in (("sorted", sorted_batches), ("file_order", file_order)):
        started = time.process_time()
        outputs = generate(model, collate, batches)
        seconds = time.process_time() - started
        values[f"generate_{name}_cpu_s"] = round(seconds, 2)
        values[f"times_generate_{name}"] = round(seconds / ours_s, 2)
        values[f"different_from_generate_{name}"] = sum(outputs[row] != ours[row] for row in all_rows)
    write_result("decoding", f"python -m benchmarks.decoding {num_sentences} {max_tokens}", values)


def sentences(number: int) -> list[str]:
    """Sources of the training rows in a fixed random order."""
    path = EXAMPLES / "data" / "libreoffice-help.en-de.train.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        sources = [row["source"] for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    random.Random(0).shuffle(sources)
    return sources[:number]


def generate(model: Any, collate: Any, batches: Sequence[list[int]]) -> dict[int, list[int]]:
    """Output tokens of each row, without tags, by Hugging Face."""
    config = model.config
    found = {}
    for rows in batches:
        inputs = collate(rows)
        sequences = model.generate(
            inputs["input_ids_BS"], attention_mask=inputs["attention_mask_BS"], num_beams=SETTINGS.beam_size,
            length_penalty=SETTINGS.length_penalty, max_new_tokens=SETTINGS.max_length,
            decoder_start_token_id=inputs["decoder_start_B"].tolist(), suppress_tokens=[config.pad_token_id],
        )  # fmt: skip
        for row, tokens in zip(rows, sequences[:, 1:].tolist(), strict=True):
            ends = [place for place, token in enumerate(tokens) if token in (config.eos_token_id, config.pad_token_id)]
            found[row] = tokens[: ends[0]] if ends else tokens
    return found


if __name__ == "__main__":
    main()
