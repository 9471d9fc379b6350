"""Our beam search, Hugging Face `generate` and CTranslate2 on the same weights and real sentences, one thread each.

`python -m benchmarks.decoding [rounds]`. Weights are those of examples/base, sentences the first of the test set as
they come, beams 5. For vocabularies beyond its 8,000 the tables of embeddings are filled up with random rows that an
output bias rules out: outputs stay those of the trained model, the work is that of the larger vocabulary.

Each contender runs in a process of its own, all in turn, in rounds of which the fastest counts, in CPU seconds.
CTranslate2 is no dependency: `pip install --target DIRECTORY --no-deps ctranslate2==4.8.5`, then PYTHONPATH=DIRECTORY.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM

from benchmarks.decoders import CONTENDERS, SPECIAL
from benchmarks.record import write_result
from harness.config.schema import DataConfig, LossConfig
from harness.data.rows import Row
from harness.models.families import MBART
from harness.models.load import load_tokenizer
from harness.scoring.scores import corpus_scores
from harness.tasks.translation import TranslationTask

EXAMPLES = Path(__file__).parents[1] / "examples"
SENTENCES = {8_000: 200, 32_000: 80, 250_000: 24}  # by size of the vocabulary
MAX_TOKENS = 4096  # rows x beams x longest source: the default
FILE_ORDER_ROWS = 16
NEVER = -1.0e4
EXPECTED = "generate float32, file order"  # whose outputs the others are compared with


def main() -> None:
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    values: dict[str, Any] = {"max_tokens": MAX_TOKENS, "rounds": num_rounds}
    for vocabulary, num_sentences in SENTENCES.items():
        with tempfile.TemporaryDirectory() as scratch:
            task, references = prepare(Path(scratch), vocabulary, num_sentences)
            found = run_all(Path(scratch), num_rounds)
        values[f"vocabulary {vocabulary}"] = compared(found, task, references)
        print(json.dumps(values[f"vocabulary {vocabulary}"], indent=1), flush=True)
    write_result("decoding", f"python -m benchmarks.decoding {num_rounds}", values)


def prepare(directory: Path, vocabulary: int, num_sentences: int) -> tuple[TranslationTask, list[str]]:
    """Writes models and job; returns the task and the references."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(EXAMPLES / "base", dtype=torch.float32)
    extend(model, vocabulary)
    model.save_pretrained(directory / "model")
    if importlib.util.find_spec("ctranslate2"):
        convert(model, directory / "ctranslate2")
    data = DataConfig.model_validate({"train": [{"path": ""}], "max_source_length": 128})
    task = TranslationTask(load_tokenizer(str(EXAMPLES / "base")), MBART, data, LossConfig())
    with gzip.open(EXAMPLES / "data" / "libreoffice-help.en-de.test.tsv.gz", "rt", encoding="utf-8") as lines:
        pairs = list(islice(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), num_sentences))
    encoded = task.encode([Row("", pair["source"], "", "en_XX", "de_DE") for pair in pairs])
    start = task.collate_sources([(encoded[0].input_ids, encoded[0].labels, encoded[0].marker)], torch.device("cpu"))
    job = {
        "sources": [[int(token) for token in one.input_ids] for one in encoded],
        "start": int(start["decoder_start_B"][0]),
        "rows": FILE_ORDER_ROWS,
        "max_tokens": MAX_TOKENS,
    }
    (directory / "job.json").write_text(json.dumps(job))
    return task, [pair["target"] for pair in pairs]


def extend(model: Any, vocabulary: int) -> None:
    """Fills the tables up with random tokens that are never an output."""
    trained = model.config.vocab_size
    torch.manual_seed(0)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.final_logits_bias = functional.pad(
        model.final_logits_bias[:, :trained], (0, vocabulary - trained), value=NEVER
    )


def convert(model: Any, directory: Path) -> None:
    """CTranslate2's own converter reads keys of the configuration that transformers 5 does not write any more."""
    from ctranslate2.converters.transformers import MBartLoader

    model.config.normalize_before = model.config.normalize_embedding = True
    loader = MBartLoader()
    spec = loader.get_model_spec(model)
    loader.set_vocabulary(spec, [SPECIAL.get(token, str(token)) for token in range(model.config.vocab_size)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = SPECIAL[0], SPECIAL[2], SPECIAL[3]
    spec.config.decoder_start_token = None  # the language of each row
    spec.validate()
    spec.optimize()
    directory.mkdir()
    spec.save(str(directory))


def run_all(directory: Path, num_rounds: int) -> dict[str, dict[str, Any]]:
    """What each contender found, with the figures of its fastest round."""
    best: dict[str, dict[str, Any]] = {}
    names = [name for name in CONTENDERS if "ctranslate2 " not in name or (directory / "ctranslate2").is_dir()]
    for _ in range(num_rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.decoders", name, str(directory)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found = json.loads((directory / f"{name}.json").read_text())
            if name not in best or found["cpu_s"] < best[name]["cpu_s"]:
                best[name] = found
    return best


def compared(found: dict[str, dict[str, Any]], task: TranslationTask, references: list[str]) -> dict[str, Any]:
    expected = found[EXPECTED]["tokens"]
    table = {}
    for name, one in found.items():
        texts = [task.to_text(tokens) for tokens in one["tokens"]]
        table[name] = {
            "cpu_s": round(one["cpu_s"], 2),
            "wall_s": round(one["wall_s"], 2),
            "output_tokens_per_cpu_s": round(sum(map(len, one["tokens"])) / one["cpu_s"]),
            "times_generate": round(found[EXPECTED]["cpu_s"] / one["cpu_s"], 2),
            "peak_mib": one["peak_mib"],
            "different_from_generate": sum(
                ours != theirs for ours, theirs in zip(one["tokens"], expected, strict=True)
            ),
            "bleu": round(corpus_scores(texts, references, ["bleu"], target_language="de").values["bleu"], 2),
        }
        if "ctranslate2 float32" in found:
            table[name]["times_ctranslate2_float32"] = round(found["ctranslate2 float32"]["cpu_s"] / one["cpu_s"], 2)
    own = found["ours float32, preset ctranslate2"]["tokens"]
    same: dict[str, Any] = {"sentences": len(references), "contenders": table}
    if "ctranslate2 float32" in found:
        pairs = zip(own, found["ctranslate2 float32"]["tokens"], strict=True)
        same["preset_ctranslate2_different_from_ctranslate2"] = sum(ours != theirs for ours, theirs in pairs)
    return same


if __name__ == "__main__":
    main()
