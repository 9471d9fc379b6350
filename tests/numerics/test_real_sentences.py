"""Beam search of a trained model on real sentences against Hugging Face `generate`, in float32."""

from __future__ import annotations

import csv
import gzip
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from harness.config.schema import DataConfig, LossConfig
from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, decode
from harness.decoding.decode import Hypothesis
from harness.models.families import MBART
from harness.models.load import load_tokenizer
from harness.tasks.translation import TranslationTask
from tests.runs import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
NUM_SENTENCES = 500
ROWS = 25  # in a batch of `generate`
SETTINGS = BeamSettings(beam_size=5, length_penalty=1.0, max_length=128)
SAME_SCORE = 1e-4  # float32 gives the log p of a long output no better
MOST_TIES = 3


def real_sentences() -> list[str]:
    path = EXAMPLES / "data" / "libreoffice-help.en-de.train.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        sources = [row["source"] for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return random.Random(5).sample(sources, NUM_SENTENCES)


def generate(model: Any, inputs: dict[str, Any]) -> list[Hypothesis]:
    outputs = model.generate(
        inputs["input_ids_BS"], attention_mask=inputs["attention_mask_BS"], num_beams=SETTINGS.beam_size,
        length_penalty=SETTINGS.length_penalty, max_new_tokens=SETTINGS.max_length,
        decoder_start_token_id=inputs["decoder_start_B"].tolist(), suppress_tokens=[model.config.pad_token_id],
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ends = (model.config.eos_token_id, model.config.pad_token_id)
    found = []
    for tokens, score in zip(outputs.sequences[:, 1:].tolist(), outputs.sequences_scores.tolist(), strict=True):
        length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(Hypothesis(tokens[:length], score))
    return found


@pytest.mark.slow
def test_five_hundred_real_sentences_get_the_hypotheses_of_generate():
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(EXAMPLES / "base", dtype=torch.float32).eval()
    model.generation_config.forced_eos_token_id = None
    data = DataConfig.model_validate({"train": [{"path": ""}], "max_source_length": 128})
    task = TranslationTask(load_tokenizer(str(EXAMPLES / "base")), MBART, data, LossConfig())
    sentences = real_sentences()
    encoded = task.encode([Row("", text, "", "en_XX", "de_DE") for text in sentences])
    examples = [(one.input_ids, one.labels, one.marker) for one in encoded]
    sizes = [len(one.input_ids) for one in encoded]

    def collate(rows: list[int]) -> dict[str, Any]:
        return task.collate_sources([examples[row] for row in rows], torch.device("cpu"))

    found = decode(model, sizes, collate, settings=SETTINGS, max_tokens=8192)
    assert found is not None
    by_length = sorted(range(NUM_SENTENCES), key=sizes.__getitem__)
    ties, different = [], []
    for start in range(0, NUM_SENTENCES, ROWS):
        batch = by_length[start : start + ROWS]
        for row, expected in zip(batch, generate(model, collate(batch)), strict=True):
            ours = found[row][0]
            if ours.token_ids != expected.token_ids:
                is_tie = abs(ours.score - expected.score) < SAME_SCORE
                texts = [(task.to_text(one.token_ids), one.score) for one in (ours, expected)]
                (ties if is_tie else different).append((sentences[row], *texts))
            else:
                assert ours.score == pytest.approx(expected.score, abs=SAME_SCORE), sentences[row]
    assert not different, different
    assert len(ties) <= MOST_TIES, ties
