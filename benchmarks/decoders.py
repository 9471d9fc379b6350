"""One contender of benchmarks/decoding.py in a process of its own: `python -m benchmarks.decoders NAME DIRECTORY`.

DIRECTORY has job.json (sources as token ids, the decoder's start, rows and tokens of a batch), `model` and, for
CTranslate2, `ctranslate2`. Output tokens, CPU seconds and the peak of memory go to NAME.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

Decode = Callable[[Sequence[int]], dict[int, list[int]]]  # row numbers -> output tokens without tags
BEAM, PENALTY, LONGEST, EOS, PAD = 5, 1.0, 128, 2, 1
NUM_WARM_UP = 4
SPECIAL = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>"}  # tokens of CTranslate2 that are not their number


def ours(directory: Path, job: dict[str, Any], precision: str = "model", preset: str = "hf") -> Decode:
    from harness.decoding.beam import BeamSettings, decode
    from harness.models.precision import in_precision

    model: Any = in_precision(_load(directory), precision)  # type: ignore[arg-type]
    settings = BeamSettings(BEAM, PENALTY, LONGEST, preset=preset)  # type: ignore[arg-type]
    sizes = [len(ids) for ids in job["sources"]]

    def run(rows: Sequence[int]) -> dict[int, list[int]]:
        found = decode(
            model, sizes, lambda ids: _inputs(job, ids), settings=settings, max_tokens=job["max_tokens"], rows=rows
        )
        assert found is not None
        return {row: best[0].token_ids for row, best in found.items()}

    return run


def ours_without_kept_memory(directory: Path, job: dict[str, Any]) -> Decode:
    """Large tensors come from the kernel each time, as glibc does it by itself."""
    from harness.models import stepper

    stepper.kept_heap = nullcontext  # type: ignore[assignment]
    return ours(directory, job)


def generate(directory: Path, job: dict[str, Any], is_sorted: bool) -> Decode:
    """Hugging Face: rows in the order of the file, or by length in batches of as many tokens as ours."""
    model = _load(directory)
    model.generation_config.forced_eos_token_id = None

    def run(rows: Sequence[int]) -> dict[int, list[int]]:
        found = {}
        for batch in _batches(job, rows, is_sorted):
            inputs = _inputs(job, batch)
            sequences = model.generate(
                inputs["input_ids_BS"], attention_mask=inputs["attention_mask_BS"], num_beams=BEAM,
                length_penalty=PENALTY, max_new_tokens=LONGEST, suppress_tokens=[PAD],
                decoder_start_token_id=inputs["decoder_start_B"].tolist(),
            )  # fmt: skip
            found |= {row: _cut(tokens) for row, tokens in zip(batch, sequences[:, 1:].tolist(), strict=True)}
        return found

    return run


def ctranslate2(directory: Path, job: dict[str, Any], compute_type: str) -> Decode:
    import ctranslate2

    numbers = {name: number for number, name in SPECIAL.items()}
    translator = ctranslate2.Translator(
        str(directory / "ctranslate2"), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=1
    )

    def run(rows: Sequence[int]) -> dict[int, list[int]]:
        sources = [[SPECIAL.get(token, str(token)) for token in job["sources"][row]] for row in rows]
        start = [[str(job["start"])]] * len(rows)
        results = translator.translate_batch(
            sources, target_prefix=start, beam_size=BEAM, length_penalty=PENALTY, max_decoding_length=LONGEST,
            max_batch_size=job["max_tokens"] // BEAM, batch_type="tokens", max_input_length=0,
        )  # fmt: skip
        return {
            row: [numbers[token] if token in numbers else int(token) for token in result.hypotheses[0]]
            for row, result in zip(rows, results, strict=True)
        }

    return run


CONTENDERS: dict[str, Callable[[Path, dict[str, Any]], Decode]] = {
    "ours float32": ours,
    "ours bfloat16": lambda directory, job: ours(directory, job, "bfloat16"),
    "ours int8": lambda directory, job: ours(directory, job, "int8"),
    "ours float32, preset ctranslate2": lambda directory, job: ours(directory, job, preset="ctranslate2"),
    "ours float32, memory not kept": ours_without_kept_memory,
    "generate float32, file order": lambda directory, job: generate(directory, job, False),
    "generate float32, sorted": lambda directory, job: generate(directory, job, True),
    "ctranslate2 float32": lambda directory, job: ctranslate2(directory, job, "float32"),
    "ctranslate2 int8": lambda directory, job: ctranslate2(directory, job, "int8"),
}


def _load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    torch.set_num_threads(1)
    return AutoModelForSeq2SeqLM.from_pretrained(directory / "model", dtype=torch.float32).eval()


def _inputs(job: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sources = [torch.tensor(job["sources"][row]) for row in rows]
    ids_BS = pad_sequence(sources, batch_first=True, padding_value=PAD)
    return {
        "input_ids_BS": ids_BS,
        "attention_mask_BS": (ids_BS != PAD).long(),
        "decoder_start_B": torch.full((len(rows),), job["start"]),
        "pad": PAD,
        "ends": [EOS],
    }


def _batches(job: dict[str, Any], rows: Sequence[int], is_sorted: bool) -> list[list[int]]:
    if not is_sorted:
        return [list(rows[start : start + job["rows"]]) for start in range(0, len(rows), job["rows"])]
    batches: list[list[int]] = []
    longest = 1
    for row in sorted(rows, key=lambda row: -len(job["sources"][row])):
        if not batches or (len(batches[-1]) + 1) * BEAM * longest > job["max_tokens"]:
            batches.append([])
            longest = len(job["sources"][row])
        batches[-1].append(row)
    return batches


def _cut(tokens: list[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in (EOS, PAD)), len(tokens))]


def main(name: str, directory: Path) -> None:
    job = json.loads((directory / "job.json").read_text())
    decode = CONTENDERS[name](directory, job)
    rows = list(range(len(job["sources"])))
    decode(rows[:NUM_WARM_UP])
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    found = decode(rows)
    figures = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    figures["peak_mib"] = int(peak.split()[1]) // 1024
    (directory / f"{name}.json").write_text(json.dumps(figures | {"tokens": [found[row] for row in rows]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
