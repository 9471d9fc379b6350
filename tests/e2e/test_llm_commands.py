"""The commands around a QLoRA run of a language model: check, train, evaluate, export, export --merge; and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from harness.cli.main import main
from tests.llm_runs import Q4, conversation, llm_run, write_talks
from tests.pairs import PAIRS
from tests.runs import harness, write_run
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow
TEST_PAIRS = PAIRS[6:12]
MAX_ANSWER = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run on two ranks with ZeRO-2 in float32 on a 4-bit base; the test rows were seen in training."""
    directory = tmp_path_factory.mktemp("llm")
    model = make_tiny_llm(directory / "model", hidden_size=64, intermediate_size=128)
    run = llm_run(
        directory, model, name="qlora", preset="zero2",
        model__quantization=Q4, adapter={"rank": 8}, optimizer__lr=2e-2, schedule__steps=40,
        data__train=[{"path": write_talks(directory / "train.jsonl", PAIRS[:12])}],
        data__test=write_talks(directory / "test.jsonl", TEST_PAIRS),
        evaluation={"metrics": ["chrf"], "beam_size": 1, "max_target_length": MAX_ANSWER},
        launch__processes=2,
    )  # fmt: skip
    path = write_run(run)
    done = harness("train", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = directory / "qlora"
    (test_dir,) = (run_dir / "evaluations").glob("step-*-test")
    return SimpleNamespace(file=path, dir=run_dir, base=model, test_dir=test_dir, directory=directory, run=run)


def command(*arguments: Any) -> int:
    """The command in this process, which has paid for its imports already."""
    return main([str(argument) for argument in arguments])


def scores_in(directory: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((directory / "scores.json").read_text())
    del scores["decode_seconds"]
    return scores


def base_in_4_bits(path: Path) -> Any:
    """As anyone would load it, but for the layout that a CPU with AVX512-BF16 computes in bfloat16 with."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def nll_and_answers(model: Any, directory: Path) -> tuple[float, list[str]]:
    """The test rows through transformers alone: nll per token to learn, and greedy answers."""
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    nll_sum, num_targets, answers = 0.0, 0, []
    for prompt, completion in TEST_PAIRS:
        ids, labels = conversation(tokenizer, {"prompt": prompt, "completion": completion})
        count = int((labels != -100).sum())
        nll_sum += float(model(input_ids=ids[None], labels=labels[None]).loss) * count
        num_targets += count
        start = int((labels != -100).nonzero()[0])
        inputs = {"input_ids": ids[None, :start], "attention_mask": torch.ones(1, start, dtype=torch.long)}
        ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
        said = model.generate(**inputs, max_new_tokens=MAX_ANSWER, do_sample=False, eos_token_id=ends)[0, start:]
        answers.append(" ".join(tokenizer.decode(said, skip_special_tokens=True).split()))
    return nll_sum / num_targets, answers


def test_check_shows_what_is_learnt(trained: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", trained.file, "name=new") == 0
    text = " ".join(capsys.readouterr().out.split())
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    (learned,) = re.findall("«(.*?)»", text)
    assert tokenizer.convert_tokens_to_string(learned.split()) == f"{PAIRS[0][1]}<|im_end|>"
    assert f"{len(learned.split())} of " in text
    assert re.search(r"LlamaForCausalLM, [\d,]+ parameters, .*; trained from the first step on: 14,848", text)
    assert "12 rows read, 12 kept" in text
    assert not (trained.directory / "new").exists()


def test_evaluate_gives_the_scores_and_answers_of_training(trained: SimpleNamespace, tmp_path: Path) -> None:
    test_file, output = trained.directory / "test.jsonl", tmp_path / "again"
    assert command("evaluate", trained.dir, "--data", test_file, "--output", output) == 0
    scores = scores_in(trained.test_dir)
    assert scores_in(output) == scores
    assert scores["nll"] < 3.0
    assert scores["chrf"] > 0.0
    for name in ("hypotheses.txt", "references.txt"):
        assert (output / name).read_text() == (trained.test_dir / name).read_text()


def test_an_adapter_alone_has_the_scores_of_its_run(trained: SimpleNamespace, tmp_path: Path) -> None:
    """Its base is read in 4 bits as in training."""
    options = ["--format", "prompt", "--beam-size", "1", "--max-length", MAX_ANSWER, "--metrics", "chrf"]
    test_file, output = trained.directory / "test.jsonl", tmp_path / "alone"
    assert command("evaluate", trained.dir / "export", "--data", test_file, "--output", output, *options) == 0
    assert scores_in(output) == scores_in(trained.test_dir)


def test_the_exported_adapter_is_the_run_in_plain_peft(trained: SimpleNamespace, tmp_path: Path) -> None:
    assert command("export", trained.dir, tmp_path / "adapter") == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= names
    assert not names & {"model.safetensors", "config.json"}
    model = PeftModel.from_pretrained(base_in_4_bits(trained.base), tmp_path / "adapter")
    nll, answers = nll_and_answers(model, tmp_path / "adapter")
    assert nll == pytest.approx(scores_in(trained.test_dir)["nll"], rel=1e-5)
    assert answers == (trained.test_dir / "hypotheses.txt").read_text().splitlines()
    without = nll_and_answers(base_in_4_bits(trained.base), trained.base)[0]
    assert without > nll + 1.0, "the adapter is what was learnt"


def test_the_merged_export_is_the_run_in_plain_transformers(trained: SimpleNamespace, tmp_path: Path) -> None:
    assert command("export", trained.dir, tmp_path / "merged", "--merge") == 0
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    nll, answers = nll_and_answers(model, tmp_path / "merged")
    assert nll == pytest.approx(scores_in(trained.test_dir)["nll"], rel=1e-4)
    assert answers == (trained.test_dir / "hypotheses.txt").read_text().splitlines()


def test_rows_of_which_nothing_is_left_to_score(
    trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Open the file. " * 400, "completion": "Gut."}) + "\n")
    options = ("--data", rows, "--format", "prompt", "--output", tmp_path / "set")
    assert command("evaluate", trained.base, *options) == 3
    assert "data.max_length: no row of the set has a token to be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "code", "place", "message"),
    [
        (["adapter.targets=[q_prj]"], 2, "adapter.targets", "no module 'q_prj' (did you mean `q_proj`?)"),
        (["adapter.modules_to_save=[head]"], 2, "adapter.modules_to_save", "no module 'head'"),
        (["adapter=null"], 2, "model.quantization", "cannot be trained: add the section `adapter`"),
        (["adapter.method=prompt_tuning", "adapter.rank=16"], 2, "adapter.method", "set `data.packing` to false"),
        (["adapter=null", "model.quantization=null", "freeze={layers: 0-9}"], 2, "freeze.layers", "no layer 2"),
        (["data.format=messages"], 3, "test.jsonl:1", "no field `messages`"),
        (["evaluation.metrics=[accuracy]"], 2, "evaluation.metrics", "task causal_lm has none"),
        (["model.path=MBART", "data.max_length=128"], 3, "task causal_lm", "model_type 'mbart' is not supported"),
    ],
)
def test_a_mistake_gives_one_clear_message(
    trained: SimpleNamespace, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str],
    overrides: list[str], code: int, place: str, message: str,
) -> None:  # fmt: skip
    overrides = [override.replace("MBART", str(tiny_models["mbart"])) for override in overrides]
    assert command("check", trained.file, "name=new", *overrides) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert place in err
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2, err
