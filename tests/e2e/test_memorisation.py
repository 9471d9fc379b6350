"""Learning works: `harness train` teaches a random model of each family 20 sentence pairs by heart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from harness.io.atomic import read_json
from tests.conftest import FAMILIES
from tests.pairs import PAIRS
from tests.runs import tiny_run, write_pairs, write_run
from tests.tiny import LANGUAGES, make_tiny_model

TWENTY = PAIRS[:20]
STEPS = 160
LEARNING_RATES = {"t5": 4e-3}  # at 6e-3 T5, which has relative positions only, stays unsure about doubled letters


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_pairs_are_learnt_by_heart(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path / "model", d_model=64)
    pairs = str(write_pairs(tmp_path / "twenty.tsv", TWENTY))
    source_language, target_language = LANGUAGES[family]
    run = tiny_run(
        tmp_path,
        model,
        name=family,
        data__train=[{"path": pairs}],
        data__test=pairs,
        data__source_language=source_language,
        data__target_language=target_language,
        batch={"tokens_per_step": 1200, "max_tokens_per_device": 1200},
        loss__label_smoothing=0.0,
        optimizer={"lr": LEARNING_RATES.get(family, 3e-3)},
        schedule={"name": "linear", "warmup_steps": 10, "steps": STEPS},
        evaluation={"beam_size": 5},
        monitor__log_every_steps=50,
        launch__processes=1,
    )
    command = [str(Path(sys.executable).with_name("harness")), "train", str(write_run(run))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    run_dir = tmp_path / family
    references = [target for _, target in TWENTY]
    hypotheses = (run_dir / "evaluations" / f"step-{STEPS:08d}-test" / "hypotheses.txt").read_text().splitlines()
    bleu = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert bleu > 95
    assert read_json(run_dir / "summary.json")["test"]["bleu"] == pytest.approx(bleu)
    assert plain_transformers(run_dir / "export", source_language, target_language, TWENTY[0][0]) == hypotheses[0]


def plain_transformers(directory: Path, source_language: str | None, target_language: str | None, text: str) -> str:
    """The translation that a user of the exported directory gets without harness."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForSeq2SeqLM.from_pretrained(directory)
    options: dict[str, Any] = {}
    if target_language is not None:
        tokenizer.src_lang = source_language
        tag = tokenizer.convert_tokens_to_ids(target_language)
        starts_with_tag = type(tokenizer).__name__ == "MBartTokenizer"
        options["decoder_start_token_id" if starts_with_tag else "forced_bos_token_id"] = tag
    ids = model.generate(**tokenizer(text, return_tensors="pt"), num_beams=5, max_new_tokens=60, **options)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
