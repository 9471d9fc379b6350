"""metrics.jsonl, TensorBoard's event files (read back with TensorBoard's own reader) and the lines on the terminal."""

import json
import math
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from harness.config.schema import RunConfig
from harness.launch.output import _last_state
from harness.training.event_file import flatten, sample_table
from harness.training.metrics_file import MetricsFile, read_metrics
from harness.training.records import RunRecords

CONFIG = RunConfig.model_validate(
    {
        "name": "enro",
        "model": {"path": "base"},
        "data": {"train": [{"path": "train.tsv"}]},
        "batch": {"tokens_per_step": 1000, "max_tokens_per_device": 500},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 40},
        "monitor": {"log_every_steps": 5},
    }
)


def step_values(step: int, **changes) -> dict:
    return {
        "loss": 5.0 / step, "nll": 4.0 / step, "learning_rate": 1e-4 * step, "grad_norm": 1.5,
        "target_tokens": 1000 + step, "rows": 40, "tokens_per_second": 2000.0, "padding_fraction": 0.125,
        "row_digest": f"{step:016x}", "peak_memory_bytes": 123456789, "epoch": 1, **changes,
    }  # fmt: skip


def open_records(run_dir: Path, rank: int = 0, resumed_step: int | None = None) -> RunRecords:
    return RunRecords.open(run_dir, CONFIG, rank, resumed_step=resumed_step)


def curves(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(run_dir: Path, tag: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in curves(run_dir).Scalars(tag)]
    assert len(found) == len(dict(found)), f"{tag} has two points at one step"
    return dict(found)


def train(records: RunRecords, first: int, last: int) -> None:
    for step in range(first, last + 1):
        records.step(step, step_values(step))


def test_event_files_hold_the_values_of_metrics_jsonl(tmp_path):
    records = open_records(tmp_path)
    train(records, 1, 7)
    records.step(8, step_values(8, update_to_weight_ratio=1e-3))
    scores = {"sentences": 50, "decode_seconds": 1.5, "loss": 2.0, "nll": 1.5, "bleu": 31.25, "chrf++": 55.5}
    records.evaluation(8, "validation", scores, signatures={"bleu": "tok:13a", "chrf++": "nc:6"})
    records.checkpoint(8, path="checkpoints/step-00000008", bytes=4096, seconds=0.5, blocked_seconds=0.25)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step"] * 8 + ["evaluation", "checkpoint"]
    assert all({"event", "step", "time_s"} <= line.keys() for line in lines)
    tag_of = {**dict.fromkeys(["loss", "nll", "learning_rate", "grad_norm", "update_to_weight_ratio"], "train")}
    for name in step_values(1).keys() - {"row_digest"} | {"update_to_weight_ratio"}:
        written = {line["step"]: line[name] for line in lines if line["event"] == "step" and name in line}
        assert written
        assert points(tmp_path, f"{tag_of.get(name, 'throughput')}/{name}") == pytest.approx(written, rel=1e-6)
    for name, value in scores.items():
        assert points(tmp_path, f"validation/{name}") == {8: value}
        assert lines[8][name] == value
    assert (lines[8]["set"], lines[8]["signature"]) == ("validation", {"bleu": "tok:13a", "chrf++": "nc:6"})
    assert points(tmp_path, "checkpoint/bytes") == {8: 4096}
    assert lines[9]["blocked_seconds"] == 0.25


def test_what_a_killed_attempt_did_after_the_resumed_step_is_taken_back(tmp_path):
    first = open_records(tmp_path)
    first.event("start", 0, reason="new run", world_size=2)
    train(first, 1, 9)
    for step in (5, 8):
        values = {"sentences": 5, "decode_seconds": 1.0, "bleu": float(step)}
        first.evaluation(step, "validation", values, signatures={"bleu": "s"})
    first.event("skip", 7, reason="not finite", world_size=2)
    first.checkpoint(5, path="c", bytes=1, seconds=1.0, blocked_seconds=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 10, "lo')  # killed here

    second = open_records(tmp_path, resumed_step=5)
    second.event("restart", 5, reason="rank 1 died", world_size=2)
    assert second.totals().target_tokens == sum(1000 + step for step in range(1, 6))
    for step in range(6, 13):
        second.step(step, step_values(step, loss=100.0 + step))
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["loss"] for record in steps] == [5.0 / step for step in range(1, 6)] + [
        100.0 + n for n in range(6, 13)
    ]
    others = [(record["event"], record["step"]) for record in records if record["event"] != "step"]
    assert others == [("start", 0), ("evaluation", 5), ("checkpoint", 5), ("restart", 5)]
    assert points(tmp_path, "train/loss") == pytest.approx({record["step"]: record["loss"] for record in steps})
    assert points(tmp_path, "validation/bleu") == {5: 5.0}
    assert second.totals().target_tokens == sum(1000 + step for step in range(1, 13))
    assert second.totals().tokens_per_second == pytest.approx(2000.0)


def test_a_run_killed_before_its_first_checkpoint_starts_its_curves_again(tmp_path):
    first = open_records(tmp_path)
    first.evaluation(0, "validation", {"sentences": 5, "decode_seconds": 1.0, "bleu": 1.0}, signatures={"bleu": "s"})
    train(first, 1, 4)
    second = open_records(tmp_path)
    second.evaluation(0, "validation", {"sentences": 5, "decode_seconds": 1.0, "bleu": 2.0}, signatures={"bleu": "s"})
    train(second, 1, 2)
    assert points(tmp_path, "validation/bleu") == {0: 2.0}
    assert sorted(points(tmp_path, "train/nll")) == [1, 2]
    assert [record["event"] for record in read_metrics(tmp_path / "metrics.jsonl")] == ["evaluation", "step", "step"]


def test_event_files_are_read_in_the_order_of_attempts_whatever_the_clock_says(tmp_path, monkeypatch):
    train(open_records(tmp_path), 1, 8)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    second = open_records(tmp_path, resumed_step=3)
    for step in (4, 5):
        second.step(step, step_values(step, loss=9.0))
    assert points(tmp_path, "train/loss") == pytest.approx({1: 5.0, 2: 2.5, 3: 5 / 3, 4: 9.0, 5: 9.0})


def test_not_a_number_is_null_in_json_and_nan_in_tensorboard(tmp_path):
    open_records(tmp_path).step(1, step_values(1, loss=math.nan, grad_norm=math.inf))
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["loss"], record["grad_norm"]) == (None, None)
    assert math.isnan(points(tmp_path, "train/loss")[1])


def test_hyper_parameters_are_on_the_hparams_page_and_make_no_sub_runs(tmp_path):
    train(open_records(tmp_path), 1, 1)
    data = HParamsPluginData.FromString(
        curves(tmp_path).SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    ).session_start_info.hparams
    assert data["optimizer.lr"].number_value == 1e-3
    assert data["model.path"].string_value == "base"
    assert json.loads(data["optimizer.betas"].string_value) == [0.9, 0.98]
    assert json.loads(data["data.train"].string_value)[0]["path"] == "train.tsv"
    assert "early_stopping" not in data
    assert all(path.is_file() for path in (tmp_path / "tensorboard").iterdir())


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": "x", "f": True}) == {"a.b.c": 1, "e": "x", "f": True}


def test_samples_are_a_table_that_no_text_breaks_out_of(tmp_path):
    open_records(tmp_path).samples(3, "validation", [("a|b", "<b>*x*</b>\ny", "")])
    [event] = curves(tmp_path).Tensors("validation/samples/text_summary")
    shown = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    assert shown == sample_table([("a|b", "<b>*x*</b>\ny", "")])
    assert shown.splitlines()[-1] == "| a&#124;b | &lt;b&gt;&#42;x&#42;&lt;/b&gt; y |  |"


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    records = open_records(tmp_path, rank=1)
    train(records, 1, 5)
    records.samples(5, "validation", [("a", "b", "c")])
    records.event("stop", 5, reason="SIGTERM")
    records.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_can_be_switched_off(tmp_path):
    config = CONFIG.model_copy(update={"monitor": CONFIG.monitor.model_copy(update={"tensorboard": False})})
    train(RunRecords.open(tmp_path, config, 0, resumed_step=None), 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("content", "steps"),
    [("", []), ('{"event": "step", "step": 1}\n{"event": "st', [1]), ('{"event": "step", "step": 1}', [1]),
     ('{"ev\n{"event": "step", "step": 2}\n\n[1]\n"x"\n\x00\x00\n{"step": 3}\n', [2])],
)  # fmt: skip
def test_torn_and_foreign_lines_are_left_out(tmp_path, content, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    assert [record["step"] for record in read_metrics(path)] == steps
    MetricsFile(path).rewind(99)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps


def test_bytes_that_are_not_utf8_are_tolerated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe{"event"\n{"event": "step", "step": 1}\n')
    assert [record["step"] for record in read_metrics(path)] == [1]


@pytest.mark.parametrize("blocked", ["metrics.jsonl", "tensorboard"])
def test_a_writer_that_cannot_open_its_file_stops_neither_training_nor_the_other_writer(tmp_path, capsys, blocked):
    if blocked == "metrics.jsonl":
        (tmp_path / blocked).mkdir()
    else:
        (tmp_path / blocked).write_text("a file where the directory should be")
    records = open_records(tmp_path)
    train(records, 1, 3)
    records.close()
    printed = capsys.readouterr().out
    assert printed.count(f"{blocked} cannot be written (") == 1
    assert records.lost[blocked] >= 3
    assert f"{blocked}: {records.lost[blocked]} records could not be written" in printed
    if blocked == "tensorboard":
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    else:
        assert sorted(points(tmp_path, "train/loss")) == [1, 2, 3]


def test_a_full_disk_loses_records_and_nothing_else(tmp_path):
    """RLIMIT_FSIZE makes a write fail in the middle of a line, as a full disk does; then there is room again."""
    script = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        from tests.unit.test_records import open_records, train
        records = open_records(Path({str(tmp_path)!r}))
        train(records, 1, 4)
        size = max(path.stat().st_size for path in Path({str(tmp_path)!r}).rglob("*") if path.is_file())
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))
        train(records, 5, 30)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        train(records, 31, 40)
        records.close()
        print("trained to the end")
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "trained to the end" in result.stdout
    assert result.stderr == ""
    for blocked in ("metrics.jsonl", "tensorboard"):
        assert f"{blocked} cannot be written (File too large)" in result.stdout
        assert f"{blocked}: " in result.stdout
    expected = {*range(1, 5), *range(31, 41)}
    assert expected <= {record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")}
    assert expected <= set(points(tmp_path, "train/loss"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_plain_lines_in_a_log(tmp_path, capsys):
    records = open_records(tmp_path)
    train(records, 1, 11)
    scores = {"sentences": 1200, "decode_seconds": 61.0, "loss": 2.0, "nll": 1.5, "bleu": 31.256}
    records.evaluation(11, "validation", scores, signatures={"bleu": "s"})
    records.checkpoint(11, path="c", bytes=3 << 20, seconds=0.5, blocked_seconds=0.5)
    records.event("skip", 11, reason="the gradient is not finite")
    records.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["step 5/40", "step 10/40"]
    assert lines[0].endswith("left: loss 1.0000, nll 0.8000, lr 5.00e-04, norm 1.500, 2,000 tokens/s")
    assert lines[2:] == [
        "step 11, validation: BLEU 31.26, loss 2.0000, nll 1.5000 (1,200 sentences in 61.0 s)",
        "step 11: checkpoint of 3.0 MiB saved in 0.5 s",
        "step 11, skip: the gradient is not finite",
    ]


def test_a_bar_on_a_terminal_and_the_same_lines_in_its_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HARNESS_TERMINAL", "1")
    monkeypatch.setenv("COLUMNS", "100")
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    records = open_records(tmp_path)
    for step in range(1, 41):
        clock[0] += 2.0
        records.step(step, step_values(step))
    records.close()
    output = capsys.readouterr().out
    states = output.split("\r")
    bars = [state for state in states if state.startswith("[")]
    assert any("step 10/40, 0:01:00 left" in bar for bar in bars)
    assert bars[-1].startswith("[########################] step 40/40  loss")
    assert all(len(state.split("\n")[-1]) < 100 for state in states)
    log = [_last_state(line.encode()).decode() for line in output.split("\n")]
    assert [line.split(",")[0].split(":")[0] for line in log if line.strip()] == [
        f"step {step}/40" for step in range(5, 41, 5)
    ]


def test_a_closed_standard_output_does_not_stop_training(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr("sys.stdout", file)
        records = open_records(tmp_path)
    train(records, 1, 10)
    records.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 10
