"""Every wrong run file or command line: exit code 2, one clear message, no traceback, nothing on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.cli.main import main
from tests.run_files import RIGHT, write_run_file


class Bad(NamedTuple):
    """``old`` -> ``new`` in the right run file, ``overrides`` on the command line; what the message must hold."""

    name: str
    old: str = ""
    new: str = ""
    overrides: tuple[str, ...] = ()
    place: str = ""
    says: str = ""


def edit(name: str, old: str, new: str, line: int, says: str) -> Bad:
    return Bad(name, old=old, new=new, place=f"run.yaml:{line}: ", says=says)


def override(name: str, *overrides: str, says: str, place: str | None = None) -> Bad:
    return Bad(name, overrides=overrides, place=f"override '{overrides[-1]}'" if place is None else place, says=says)


ONE_KEY = [
    edit("unknown top-level key", "name:", "nam: x\nname:", 1, "nam: unknown key (did you mean `name`?)"),
    edit("unknown section key", "lr: 3e-5", "lr: 3e-5, beta: 3", 14, "did you mean `optimizer.betas`?"),
    edit("key in the wrong section", "name: enro", "name: enro\nlr: 1", 2, "did you mean `optimizer.lr`?"),
    edit("another trainer's name", "lr: 3e-5", "lr: 3e-5, max_grad_norm: 1", 14, "did you mean `optimizer.clip_norm`?"),
    edit("key that resembles nothing", "name: enro", "name: enro\nqqqq: 1", 2, "qqqq: unknown key; keys here: name,"),
    edit("duplicate key", "lr: 3e-5", "lr: 3e-5, lr: 1e-5", 14, "optimizer.lr: given twice, first in line 14"),
    edit("duplicate section", "name: enro", "name: enro\nname: enfr", 2, "name: given twice, first in line 1"),
    edit("missing key", "lr: 3e-5", "eps: 1e-6", 14, "optimizer.lr: is required"),
    edit("missing section", "optimizer: {lr: 3e-5}\n", "", 1, "optimizer: is required"),
    edit("number as text", "lr: 3e-5", "lr: '3e-5'", 14, "must be a valid number, got the text '3e-5'"),
    edit("text as number", "name: enro", "name: 5", 1, "name: must be text (put it in quotes), got 5"),
    edit("date as name", "name: enro", "name: 2026-01-01", 1, "name: must be text"),
    edit("fraction as integer", "steps: 100", "steps: 100.5", 15, "must be a valid integer, got 100.5"),
    edit("yes is not a boolean", "dtype:", "gradient_checkpointing: yes\n  dtype:", 5, "must be a valid boolean"),
    edit("mistyped choice", "dtype: bfloat16", "dtype: bfloat", 5, "did you mean `bfloat16`?"),
    edit("section as scalar", "deepspeed: {preset: zero2}", "deepspeed: zero2", 16, "must be a section"),
    edit("list as section", "[{path: train.tsv}]", "{path: train.tsv}", 7, "data.train: must be a valid list"),
    edit("empty list", "[{path: train.tsv}]", "[]", 7, "at least 1 item"),
    edit("key in a list item", "[{path: train.tsv}]", "[{pat: x}]", 7, "did you mean `data.train.0.path`?"),
    edit("negative learning rate", "lr: 3e-5", "lr: -1", 14, "must be greater than 0, got -1"),
    edit("infinite learning rate", "lr: 3e-5", "lr: .inf", 14, "must be a finite number"),
    edit("probability above one", "lr: 3e-5", "lr: 1, betas: [0.9, 1.5]", 14, "optimizer.betas.1: must be less than 1"),
    edit("three betas", "lr: 3e-5", "lr: 1, betas: [0.9, 0.9, 0.9]", 14, "at most 2 items"),
    edit("name that leaves the directory", "name: enro", "name: ../x", 1, "only letters, digits"),
    edit("no processes", "name: enro", "name: enro\nlaunch: {processes: 0}", 2, "must be greater than 0"),
    edit("processes in words", "name: enro", "name: enro\nlaunch: {processes: two}", 2, "or must be 'auto'"),
    edit("key that is not text", "name: enro", "name: enro\n1: x", 2, "a key must be text"),
    edit("unknown metric", "every_steps: 50", "every_steps: 50, metrics: [blue]", 17, "did you mean `bleu`?"),
]

CONTRADICTIONS = [
    edit("no model", "  path: no-such-org/no-such-model\n", "", 3, "model: needs `path`"),
    edit("model from two places", "dtype:", "config: x\n  dtype:", 5, "contradicts `model.path`"),
    edit("float16 on a CPU", "bfloat16", "float16", 5, "not possible on a CPU"),
    edit("flash attention on a CPU", "dtype:", "attention: flash_attention_2\n  dtype:", 5, "GPUs only"),
    edit("steps and epochs", "steps: 100", "steps: 100, epochs: 3", 15, "contradicts `schedule.steps`"),
    edit("no length", "warmup_steps: 10, steps: 100", "warmup_steps: 10", 15, "needs `steps` or `epochs`"),
    edit("endless warm-up", "warmup_steps: 10", "warmup_steps: 101", 15, "101 is more than `schedule.steps` (100)"),
    edit("floor above the peak", "steps: 100", "steps: 100, min_lr: 1", 15, "above the peak `optimizer.lr`"),
    edit("micro-batch below one row", "per_device: 1024", "per_device: 100", 13, "raise it to 128"),
    edit("step below one row", "per_step: 4096", "per_step: 100", 13, "raise it to 128"),
    edit("source without place", "{path: train.tsv}", "{weight: 2}", 7, "needs `path`, or `source` and `target`"),
    edit("half a pair", "{path: train.tsv}", "{source: a}", 7, "needs both `source` and `target`"),
    edit("path and pair", "{path: train.tsv}", "{path: a, target: b}", 7, "keep `path`, or the pair"),
    edit("evaluation without rows", "  validation: dev.tsv\n", "", 16, "set `data.validation`"),
    edit("metric twice", "every_steps: 50", "metrics: [bleu, bleu]", 17, "names a metric twice"),
    edit("decoding batch below one row", "every_steps: 50", "max_tokens_per_device: 99", 17, "raise it to 640"),
    edit("stopping unscored", "steps: 50}", "steps: 50}\nearly_stopping: {metric: ter}", 18, "ter is not scored"),
    edit("stopping never scored", "{every_steps: 50}", "null\nearly_stopping: {}", 18, "`evaluation` is null"),
    edit("stopping scored once", "{every_steps: 50}", "{}\nearly_stopping: {}", 18, "scored only at the end"),
    edit("adafactor under ZeRO", "lr: 3e-5", "lr: 3e-5, name: adafactor", 14, "set `deepspeed.preset` to zero0"),
    edit("unknown preset", "zero2", "zero-2_ofload", 16, "did you mean `zero2_offload`?"),
    edit("NVMe without a place", "zero2", "zero3_nvme", 16, "set `deepspeed.nvme_path`"),
    edit("DeepSpeed file missing", "zero2", "./none.json", 16, "cannot read none.json: No such file"),
]

OVERRIDES = [
    override("no equals sign", "optimizer.lr", says="must have the form key.path=value"),
    override("no key", "=3", says="must have the form key.path=value"),
    override("empty part", "optimizer..lr=3", says="must have the form key.path=value"),
    override("value not YAML", "name=[", says="not YAML"),
    override("wrong type", "optimizer.lr=abc", says="optimizer.lr: must be a valid number, got the text 'abc'"),
    override("unknown key", "optimizer.rl=1", says="did you mean `optimizer.lr`?"),
    override("unknown section", "optimiser.lr=1", says="did you mean `optimizer`?"),
    override("through a scalar", "name.x=1", says="name is the text 'enro', not a section"),
    override("past the end of a list", "data.train.3.path=x", says="data.train has 1 entries"),
    override(
        "inside a new list", "data.train=[{path: x, weight: 0}]", says="data.train.0.weight: must be greater than 0"
    ),
    override("contradiction", "schedule.steps=5", says="more than `schedule.steps` (5)", place="run.yaml:15"),
    override("required section switched off", "optimizer=null", says="must be a section"),
]

DEEPSPEED_OVERRIDES = [
    ("batch size", "{train_batch_size: 8}", "train_batch_size: belongs to the run file: set `batch.tokens_per_step`"),
    ("micro-batch", "{train_micro_batch_size_per_gpu: 8}", "set `batch.max_tokens_per_device`"),
    ("accumulation", "{gradient_accumulation_steps: 4}", "belongs to the run file"),
    ("clipping", "{gradient_clipping: 0.5}", "set `optimizer.clip_norm`"),
    ("precision", "{fp16: {enabled: true}}", "set `model.dtype`"),
    ("precision off", "{bf16: {enabled: false}}", "set `model.dtype`"),
    ("autocast", "{torch_autocast: {enabled: true}}", "set `model.dtype`"),
    ("optimizer", "{optimizer: {type: Adam}}", "set the section `optimizer`"),
    ("scheduler", "{scheduler: {type: WarmupLR}}", "set the section `schedule`"),
    ("unknown top-level key", "{zero_optimisation: {stage: 2}}", "did you mean `zero_optimization`?"),
    ("unknown ZeRO key", "{zero_optimization: {overlap_com: true}}", "did you mean `overlap_comm`?"),
    ("removed key", "{elasticity: {}}", "was removed from DeepSpeed"),
    ("removed ZeRO key", "{zero_optimization: {mics_shard_size: 2}}", "was removed from DeepSpeed"),
    ("old ZeRO key", "{zero_optimization: {cpu_offload: true}}", '"offload_optimizer": {"device": "cpu"}'),
    ("unsupported parallelism", "{tensor_parallel: {autotp_size: 2}}", "tensor parallelism is not supported"),
    ("stage four", "{zero_optimization: {stage: 4}}", "must be 0, 1, 2 or 3, got 4"),
    ("stage as text", "{zero_optimization: {stage: '2'}}", "must be 0, 1, 2 or 3, got '2'"),
    ("ZeRO not an object", "{zero_optimization: 2}", "must be an object, got 2"),
    ("offload not an object", "{zero_optimization: {offload_optimizer: cpu}}", "must be an object"),
    ("offload device", "{zero_optimization: {offload_optimizer: {device: disk}}}", "must be none, cpu or nvme"),
    ("offload key", "{zero_optimization: {offload_optimizer: {devise: cpu}}}", "did you mean `device`?"),
    ("NVMe at stage 2", "{zero_optimization: {offload_optimizer: {device: nvme}}}", "stage 3 only"),
    ("parameters at stage 2", "{zero_optimization: {offload_param: {device: cpu}}}", "needs ZeRO stage 3"),
    ("offload at stage 0", "{zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}}", "this is stage 0"),
]

NOT_YAML = [
    ("empty file", "", "the run file is empty"),
    ("only a remark", "# nothing\n", "the run file is empty"),
    ("a list", "- name: x\n", "must be a mapping"),
    ("a word", "name\n", "must be a mapping"),
    ("a tab", "model:\n\tpath: x\n", "run.yaml:2: not YAML: a tab: indent with spaces"),
    ("open bracket", "data: [1\n", "not YAML"),
    ("bad indentation", "name: x\n data: 2\n", "run.yaml:2: not YAML"),
    ("undefined alias", "name: *x\n", "run.yaml:1: not YAML"),
    ("python object", "name: !!python/object/apply:os.system [ls]\n", "is not allowed"),
    ("two documents", RIGHT + "---\n" + RIGHT, "not YAML"),
    ("holds itself", "deepspeed: &a {overrides: *a}\n", "anchors"),
    ("nested too deeply", "name: " + "[" * 5000, "not YAML: nested too deeply"),
]


def fails_cleanly(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command in process; returns its message."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert len(err) < 1500
    return err


@pytest.mark.parametrize("bad", [*ONE_KEY, *CONTRADICTIONS, *OVERRIDES], ids=lambda bad: bad.name)
def test_one_mistake_gives_one_message_with_its_place(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(tmp_path, *([(bad.old, bad.new)] if bad.old else []))
    err = fails_cleanly(capsys, "plan", str(path), *bad.overrides)
    assert bad.says in err
    assert bad.place in err
    assert "errors" not in err, "one mistake, one message"


@pytest.mark.parametrize(("overrides", "says"), [case[1:] for case in DEEPSPEED_OVERRIDES])
def test_deepspeed_overrides_must_not_fight_the_run_file(
    overrides: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(tmp_path, ("{preset: zero2}", f"{{preset: zero2, overrides: {overrides}}}"))
    err = fails_cleanly(capsys, "plan", str(path))
    assert says in err
    assert "run.yaml:16: deepspeed.overrides." in err


@pytest.mark.parametrize(("overrides", "says"), [case[1:] for case in DEEPSPEED_OVERRIDES])
def test_the_same_in_a_deepspeed_file_names_that_file(
    overrides: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.config.document import parse_value

    document = {"zero_optimization": {"stage": 2}, **parse_value(overrides)}
    if isinstance(document["zero_optimization"], dict):
        document["zero_optimization"].setdefault("stage", 2)
    (tmp_path / "ds.json").write_text(json.dumps(document))
    path = write_run_file(tmp_path, ("zero2", str(tmp_path / "ds.json")))
    err = fails_cleanly(capsys, "plan", str(path))
    assert says in err
    assert "run.yaml:16: deepspeed.preset: " in err
    assert "ds.json: " in err


@pytest.mark.parametrize(("text", "says"), [case[1:] for case in NOT_YAML], ids=[case[0] for case in NOT_YAML])
def test_what_is_not_a_yaml_mapping(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in fails_cleanly(capsys, "plan", str(write_run_file(tmp_path, text=text)))


def test_unreadable_run_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"name: x\noutput_dir: caf\xe9\n")
    assert "none.yaml: cannot read" in fails_cleanly(capsys, "plan", str(tmp_path / "none.yaml"))
    assert "Is a directory" in fails_cleanly(capsys, "plan", str(tmp_path))
    assert "latin1.yaml:2: the run file is not UTF-8" in fails_cleanly(capsys, "plan", str(tmp_path / "latin1.yaml"))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"zero_optimization": {"stage": 2}} x'])
def test_a_deepspeed_file_that_is_not_a_json_object(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text(text, encoding="latin-1")
    path = write_run_file(tmp_path, ("zero2", str(tmp_path / "ds.json")))
    assert "ds.json" in fails_cleanly(capsys, "plan", str(path))


def test_every_mistake_is_reported_at_once_in_order_of_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(
        tmp_path, ("name: enro", "name: enro\nname: x"), ("bfloat16", "bfloat"), ("lr: 3e-5", "rl: 3e-5")
    )
    err = fails_cleanly(capsys, "plan", str(path), "loss.label_smoothing=2")
    assert "5 errors" in err
    lines = [line.strip() for line in err.splitlines()[1:]]
    assert [line.split(": ")[0].rpartition("run.yaml")[2] for line in lines[:4]] == [":2", ":6", ":15", ":15"]
    assert lines[4].startswith("override 'loss.label_smoothing=2'")


def test_two_contradictions_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = fails_cleanly(
        capsys, "plan", str(write_run_file(tmp_path)), "model.config=x", "schedule.epochs=1", "deepspeed.preset=zero9"
    )
    assert "3 errors" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required"),
        (["trian", "run.yaml"], "invalid choice: 'trian'"),
        (["plan"], "the following arguments are required: RUN.yaml"),
        (["plan", "run.yaml", "--devises", "2"], "unrecognized arguments: --devises 2"),
        (["plan", "run.yaml", "--devices", "0"], "at least 1"),
        (["plan", "run.yaml", "--devices", "two"], "must be a whole number"),
        (["schema", "x"], "unrecognized arguments: x"),
        (["status"], "the following arguments are required: RUN"),
    ],
)
def test_wrong_command_lines(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in fails_cleanly(capsys, *arguments)


@pytest.mark.parametrize("size", ["80 apples", "-1GiB", "0", "GiB"])
def test_memory_sizes(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run_file(tmp_path)
    assert "size in bytes" in fails_cleanly(capsys, "plan", str(path), f"--device-memory={size}")


@pytest.mark.parametrize("verb", ["status", "stop"])
def test_not_a_run_directory(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such run directory" in fails_cleanly(capsys, verb, str(tmp_path / "none"))
    assert "it has no plan.json" in fails_cleanly(capsys, verb, str(tmp_path))
