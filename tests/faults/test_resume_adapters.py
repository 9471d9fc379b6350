"""Adapters and causal language models, killed and started again, end with the weights of the run that was not killed,
bit for bit (float32 and bfloat16, CPU); and what their checkpoints hold is the adapter alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness.checkpoint.state import CheckpointTensors
from harness.cli.main import main
from tests.llm_runs import Q4, last_checkpoint, llm_run
from tests.runs import harness, run_ranks, same_state, steps_of, write_run
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow

Runs = dict[str, dict[str, Any]]
NUM_STEPS = 10
LORA = {"model__quantization": Q4, "model__dtype": "bfloat16", "adapter": {"rank": 4, "dropout": 0.1}}
PROMPT = {"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 5}, "data__packing": False}
CASES: dict[str, dict[str, Any]] = {
    "lora-4bit-zero2": LORA | {"preset": "zero2"},
    "lora-4bit-zero3": LORA | {"preset": "zero3"},
    "prompt-tuning-zero2": PROMPT | {"preset": "zero2"},
    "packed-zero3": {"preset": "zero3"},
}
ADAPTER_NAMES = {"lora": ".lora_", "prompt": "prompt_encoder."}


def runs_in(directory: Path, model: Path) -> Runs:
    common = {
        "model__attention_dropout": 0.1, "schedule__steps": NUM_STEPS, "launch__processes": 2,
        "launch__max_restarts": 0, "checkpoint__every_steps": 2, "checkpoint__keep_last": 4,
    }  # fmt: skip
    return {name: llm_run(directory, model, name=name, **(common | changes)) for name, changes in CASES.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llm(tmp_path_factory.mktemp("base") / "model", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that nothing happens to."""
    runs = runs_in(tmp_path_factory.mktemp("unbroken"), model)
    run_ranks(list(runs.values()), world_size=2)
    return runs


@pytest.fixture(scope="module")
def resumed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same runs, each killed in its seventh step, in the second epoch, and ended by other processes."""
    runs = runs_in(tmp_path_factory.mktemp("resumed"), model)
    for run in runs.values():
        killed = harness("train", str(write_run(run)), HARNESS_FAULT="step:7", HARNESS_FAULT_RANK="1")
        assert killed.returncode == 1, killed.stderr
        assert "rank 1 was killed by SIGKILL" in killed.stderr
        assert last_checkpoint(run).name == "step-00000006"
    run_ranks(list(runs.values()), world_size=2)
    return runs


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_never_killed(case: str, unbroken: Runs, resumed: Runs) -> None:
    ours, theirs = steps_of(resumed[case]), steps_of(unbroken[case])
    assert [step["step"] for step in ours] == list(range(1, NUM_STEPS + 1))
    assert ours[6]["epoch"] == 1
    for key in ("row_digest", "loss", "grad_norm"):
        assert [step[key] for step in ours] == [step[key] for step in theirs], key
    assert same_state(last_checkpoint(resumed[case]), last_checkpoint(unbroken[case]))


@pytest.mark.parametrize("case", [case for case in CASES if case != "packed-zero3"])
def test_the_base_is_in_no_checkpoint(case: str, unbroken: Runs) -> None:
    checkpoint, part = last_checkpoint(unbroken[case]), ADAPTER_NAMES[case.partition("-")[0]]
    files = list(checkpoint.glob("*.safetensors"))
    stored = [item for file in files for item in load_file(file).items()]
    assert all(part in name for name, _ in stored)
    tensors = CheckpointTensors(checkpoint)
    num_trained = sum(tensors.whole(name).numel() for name in tensors.names())
    tensor_bytes = sum(tensor.nbytes for _, tensor in stored)
    assert tensor_bytes == 3 * 4 * num_trained, "float32 masters and both moments of AdamW, each once"
    assert sum(file.stat().st_size for file in files) < tensor_bytes + 50_000, "names of tensors"
    assert num_trained < 10_000


@pytest.mark.parametrize("frozen", [{"adapter": {"rank": 4}}, {"freeze": {"layers": "0"}}], ids=["adapter", "freeze"])
def test_another_base_is_refused(
    frozen: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight differs: neither resumed nor exported. With the weights of old the run goes on."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    run = llm_run(
        tmp_path, base, name="run", schedule__steps=4, checkpoint__every_steps=2, launch__max_restarts=0, **frozen
    )
    file, run_dir, weights = str(write_run(run)), tmp_path / "run", base / "model.safetensors"
    assert harness("train", file, HARNESS_FAULT="step:3").returncode == 1
    old = weights.read_bytes()
    tensors = load_file(weights)
    next(tensor for name, tensor in tensors.items() if "layers.0" in name).view(-1)[0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == len(old)

    refused = harness("train", file)
    assert refused.returncode == 3
    assert "step-00000002: the weights of the base have changed" in refused.stderr
    assert "bring the old files back to model.path" in refused.stderr
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 3
    assert "the weights of the base have changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    weights.write_bytes(old)
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 0
    resumed = harness("train", file)
    assert resumed.returncode == 0, resumed.stderr
    assert [step["step"] for step in steps_of(run)] == [1, 2, 3, 4]
