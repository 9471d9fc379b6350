"""The life of every adapter method under ZeRO-2 and ZeRO-3 on two ranks: on a pretrained translation model and real
rows it learns, it is stopped and goes on as if it had not been, and its export is the trained model in plain PEFT."""

from __future__ import annotations

import csv
import gzip
import re
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from sacrebleu import corpus_bleu
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from harness.cli.main import main
from harness.models.adapter_files import load_adapter
from tests.llm_runs import evaluations_of, last_checkpoint
from tests.runs import REPOSITORY, SHARD_ALL, run_ranks, same_state, steps_of
from tests.stopping_worker import STOP_STEP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Run = dict[str, Any]
BASE, DATA = REPOSITORY / "examples" / "base", REPOSITORY / "examples" / "data"
STAGES = ("zero2", "zero3")
NUM_STEPS, NUM_TRAIN, NUM_DEV = 6, 400, 24


class Method(NamedTuple):
    """Learning rate, what the nll per token of the validation rows must fall by in NUM_STEPS, and other keys."""

    lr: float
    fall: float
    options: dict[str, Any]


LOW_RANK = {"rank": 8, "alpha": 16.0, "dropout": 0.1}
VIRTUAL = {"num_virtual_tokens": 5}
METHODS = {
    "lora": Method(6e-3, 0.03, LOW_RANK),
    "rslora": Method(3e-3, 0.025, LOW_RANK),
    "dora": Method(6e-3, 0.03, LOW_RANK),
    "pissa": Method(5e-4, 0.03, LOW_RANK),
    "adalora": Method(5e-2, 0.03, LOW_RANK),
    "ia3": Method(6e-2, 0.018, {}),
    "prefix_tuning": Method(1e-1, 0.12, VIRTUAL),
    "prompt_tuning": Method(3e-1, 0.4, VIRTUAL),
    "p_tuning": Method(3e-2, 0.25, VIRTUAL),
    "bottleneck": Method(1e-2, 0.025, {"bottleneck_size": 16}),
}
CASES = [(method, stage) for method in METHODS for stage in STAGES]


def first_rows(name: str, count: int, directory: Path) -> str:
    with gzip.open(DATA / f"libreoffice-help.en-de.{name}.tsv.gz", "rt", encoding="utf-8") as file:
        (directory / f"{name}.tsv").write_text("".join(islice(file, 1 + count)), encoding="utf-8")
    return str(directory / f"{name}.tsv")


def run_of(directory: Path, method: str, stage: str, name: str) -> Run:
    lr, _, options = METHODS[method]
    return {
        "name": name,
        "output_dir": str(directory),
        "model": {"path": str(BASE), "dropout": 0.1},
        "adapter": {"method": method, **options},
        "data": {
            "train": [{"path": str(directory / "train.tsv")}],
            "validation": str(directory / "dev.tsv"),
            "source_column": "target",  # German to English, of which the base has seen little
            "target_column": "source",
            "source_language": "de_DE",
            "target_language": "en_XX",
            "max_source_length": 64,
            "max_target_length": 64,
        },
        "batch": {"tokens_per_step": 512, "max_tokens_per_device": 384},
        "optimizer": {"lr": lr},
        "schedule": {"name": "linear", "warmup_steps": 2, "steps": NUM_STEPS},
        "deepspeed": {"preset": stage, "overrides": SHARD_ALL if stage == "zero3" else {}},
        "evaluation": {"metrics": [], "beam_size": 2},
        "monitor": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Run, Run]]:
    """By method and stage: a run that nothing happens to, and the same one stopped and started again."""
    directory = tmp_path_factory.mktemp("methods")
    first_rows("train", NUM_TRAIN, directory)
    first_rows("dev", NUM_DEV, directory)
    found = {}
    for method, stage in CASES:
        unbroken, stopped = (run_of(directory, method, stage, f"{method}-{stage}{end}") for end in ("", "-stopped"))
        found[method, stage] = unbroken, stopped | {"evaluation": None}
    in_turn = [run for unbroken, stopped in found.values() for run in (unbroken, stopped, stopped)]
    run_ranks(in_turn, world_size=2, worker=REPOSITORY / "tests" / "stopping_worker.py", timeout_s=1500.0)
    return found


def directory_of(run: Run) -> Path:
    return Path(run["output_dir"]) / run["name"]


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_it_learns(method: str, stage: str, runs: dict[tuple[str, str], tuple[Run, Run]]) -> None:
    start, end = (record["nll"] for record in evaluations_of(runs[method, stage][0]))
    assert end < start - METHODS[method].fall


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_the_same_under_both_stages(method: str, runs: dict[tuple[str, str], tuple[Run, Run]]) -> None:
    ours, theirs = (steps_of(runs[method, stage][0]) for stage in STAGES)
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in ours] == pytest.approx([step[key] for step in theirs], rel=1e-5), key


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_stopped_and_resumed_is_never_stopped(
    method: str, stage: str, runs: dict[tuple[str, str], tuple[Run, Run]]
) -> None:
    unbroken, stopped = runs[method, stage]
    assert f"saved at step {STOP_STEP}" in (directory_of(stopped) / "error-0.txt").read_text()
    assert not (directory_of(unbroken) / "error-0.txt").exists()
    for key in ("step", "row_digest", "loss", "grad_norm"):
        assert [step[key] for step in steps_of(stopped)] == [step[key] for step in steps_of(unbroken)], key
    assert len(steps_of(unbroken)) == NUM_STEPS
    assert same_state(last_checkpoint(stopped), last_checkpoint(unbroken))


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_the_export_is_the_trained_model(method: str, stage: str, runs: dict[tuple[str, str], tuple[Run, Run]]) -> None:
    """But for the order of sums: the engine's weights lie otherwise in memory, and PiSSA's become a LoRA on the
    untouched base."""
    directory = directory_of(runs[method, stage][1])
    last = torch.load(directory / "last.pt")
    base = AutoModelForSeq2SeqLM.from_pretrained(BASE, dtype=torch.float32).eval()
    with torch.no_grad():
        untrained = base(**last["inputs"]).logits
        if method == "bottleneck":
            model: Any = load_adapter(base, directory / "export")
        else:
            model = PeftModel.from_pretrained(base, directory / "export")
        logits = model.eval()(**last["inputs"]).logits
    torch.testing.assert_close(logits, last["logits"], rtol=0.0, atol=1e-4 if method == "pissa" else 2e-5)
    assert float((logits - untrained).abs().max()) > 0.1, "what was learnt is in the export"


def test_the_merged_model_has_the_same_bleu(
    runs: dict[tuple[str, str], tuple[Run, Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `harness export --merge` tells it, and as plain transformers and sacreBLEU find it."""
    run = runs["lora", "zero2"][0]
    assert main(["export", str(directory_of(run)), str(tmp_path / "merged"), "--merge"]) == 0
    pattern = f"BLEU of {NUM_DEV} rows of validation: (.*) with the adapter, (.*) merged"
    told = re.search(pattern, capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) == pytest.approx(float(told[2]), abs=0.1)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged", src_lang="de_DE")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with Path(run["data"]["validation"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    search = {"num_beams": 2, "max_new_tokens": 64, "do_sample": False, "forced_eos_token_id": None}
    texts = []
    for row in rows:
        inputs = tokenizer(row["target"], truncation=True, max_length=64, return_tensors="pt")
        found = model.generate(**inputs, **search, decoder_start_token_id=tokenizer.convert_tokens_to_ids("en_XX"))
        texts += tokenizer.batch_decode(found, skip_special_tokens=True)
    assert corpus_bleu(texts, [[row["source"] for row in rows]]).score == pytest.approx(float(told[2]), abs=0.01)
    assert float(told[2]) > 1.0
