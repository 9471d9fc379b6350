"""What a run leaves in export/: plain transformers opens it, and it is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from harness.checkpoint.state import CheckpointTensors
from harness.config.load import load_run_config
from harness.training.prepare import build_task, prepare_sets
from tests.conftest import FAMILIES
from tests.pairs import PAIRS
from tests.plain import padded_batch
from tests.runs import SHARD_ALL, run_ranks, tiny_run, write_pairs, write_run
from tests.tiny import LANGUAGES

pytestmark = pytest.mark.slow

SMOOTHING = 0.1
PRESETS = ("zero0", "zero1", "zero2", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    **{preset: {"deepspeed__preset": preset} for preset in PRESETS},
    "bfloat16": {"model__dtype": "bfloat16"},
    "eager": {"model__attention": "eager"},
    "marian-bfloat16": {"model__dtype": "bfloat16"},
}

ALL = [*VARIANTS, *FAMILIES]
Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("export")
    validation = write_pairs(directory / "validation.tsv", PAIRS[:9])
    found: Runs = {}
    for name in ALL:
        family = next((one for one in FAMILIES if name in (one, f"{one}-bfloat16")), "mbart")
        source, target = LANGUAGES[family]
        changes = {"deepspeed__preset": "zero2", **VARIANTS.get(name, {})}
        if name == "zero3":
            changes["deepspeed__overrides"] = SHARD_ALL
        found[name] = tiny_run(
            directory, tiny_models[family], name=name,
            data__validation=str(validation), data__source_language=source, data__target_language=target,
            loss={"label_smoothing": SMOOTHING, "convention": "torch"}, schedule__steps=6,
            evaluation={"every_steps": 3, "beam_size": 1, "max_target_length": 6, "metrics": ["chrf"]},
            **changes,
        )  # fmt: skip
    run_ranks(list(found.values()), world_size=2, timeout_s=800)
    return found


def run_dir(run: dict[str, Any]) -> Path:
    return Path(run["output_dir"]) / run["name"]


def exported_step(run: dict[str, Any]) -> int:
    return int(json.loads((run_dir(run) / "summary.json").read_text())["exported_step"])


def recorded_losses(run: dict[str, Any]) -> dict[str, float]:
    """`loss` and `nll` of the validation set, as the engine's weights gave them at the exported step."""
    records = [json.loads(line) for line in (run_dir(run) / "metrics.jsonl").read_text().splitlines()]
    (found,) = (r for r in records if r["event"] == "evaluation" and r["step"] == exported_step(run))
    return {name: found[name] for name in ("loss", "nll")}


def plain_losses(run: dict[str, Any], model: Any) -> dict[str, float]:
    """The same of any model, by plain PyTorch."""
    config = load_run_config(write_run(run), [])
    rows = prepare_sets(config, build_task(config))["validation"].rows
    inputs, labels_BT = padded_batch(rows.take(range(len(rows))), model.config.pad_token_id)
    with torch.no_grad():
        logits, labels = model(**inputs).logits.float().flatten(0, 1), labels_BT.flatten()
    smoothed = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    return {"loss": float(smoothed), "nll": float(F.cross_entropy(logits, labels))}


@pytest.mark.parametrize("name", ALL)
def test_plain_transformers_gives_the_recorded_validation_loss(name: str, runs: Runs) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(run_dir(runs[name]) / "export", dtype="auto")
    assert model.dtype == (torch.bfloat16 if "bfloat16" in name else torch.float32)
    losses = plain_losses(runs[name], model)
    # bfloat16: other batches and padding round the same sums otherwise, in 8 significant bits.
    rel = 1e-3 if "bfloat16" in name else 1e-6
    print(name, {key: losses[key] / value - 1 for key, value in recorded_losses(runs[name]).items()})
    assert losses == pytest.approx(recorded_losses(runs[name]), rel=rel)
    untrained = AutoModelForSeq2SeqLM.from_pretrained(runs[name]["model"]["path"])
    assert losses["nll"] < plain_losses(runs[name], untrained)["nll"] - 0.01


@pytest.mark.parametrize("name", ALL)
def test_weights_are_the_masters_of_the_checkpoint_bit_for_bit(name: str, runs: Runs) -> None:
    run = runs[name]
    tensors = CheckpointTensors(run_dir(run) / "checkpoints" / f"step-{exported_step(run):08d}")
    model = AutoModelForSeq2SeqLM.from_pretrained(run_dir(run) / "export", dtype="auto")
    never_saved = set(model._keys_to_ignore_on_save or ())  # Marian's sines
    weights = {key: weight for key, weight in model.named_parameters() if key not in never_saved}
    assert tensors.names() == sorted(weights)
    for key, weight in weights.items():
        assert torch.equal(tensors.whole(key).to(weight.dtype), weight), key
    with safe_open(run_dir(run) / "export" / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 - not a dict
    assert dtypes == {model.dtype}


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_tables_stay_shared(name: str, runs: Runs) -> None:
    exported, original = (
        AutoModelForSeq2SeqLM.from_pretrained(path)
        for path in (run_dir(runs[name]) / "export", runs[name]["model"]["path"])
    )
    assert tables(exported) == tables(original)
    assert len(set(tables(exported).values())) < len(tables(exported))


def tables(model: Any) -> dict[str, int]:
    """Number of the storage of each embedding and of the output layer."""
    parts = {
        "encoder": model.get_encoder().get_input_embeddings().weight,
        "decoder": model.get_decoder().get_input_embeddings().weight,
        "output": model.get_output_embeddings().weight,
    }
    storages = list(dict.fromkeys(part.data_ptr() for part in parts.values()))
    return {name: storages.index(part.data_ptr()) for name, part in parts.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokeniser_is_the_one_that_was_trained_with(name: str, runs: Runs) -> None:
    exported, original = (
        AutoTokenizer.from_pretrained(path) for path in (run_dir(runs[name]) / "export", runs[name]["model"]["path"])
    )
    source, target = LANGUAGES[name]
    for tokenizer in (exported, original):
        if source:
            tokenizer.src_lang, tokenizer.tgt_lang = source, target
    for text, translation in PAIRS:
        assert exported(text, text_target=translation) == original(text, text_target=translation)


def test_nothing_temporary_is_left(runs: Runs) -> None:
    assert not [path for run in runs.values() for path in run_dir(run).glob(".export*")]
