"""The command: help, speed, exit codes, and the verbs that only read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.cli import doctor
from harness.cli.main import VERBS, main
from harness.errors import ConfigError, DataError, ExitCode, HarnessError, Interrupted, NonFiniteError, ResourceError
from tests.run_files import write_run_file

IN_A_FRESH_PYTHON = """
import sys
from harness.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "deepspeed", "datasets", "sacrebleu", "numpy"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def fresh(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command in a new process, and the shortest of three wall times in seconds."""
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", IN_A_FRESH_PYTHON, *arguments], capture_output=True, text=True, check=False
        )
        times.append(time.monotonic() - started)
    return done, min(times)


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["train", "--help"], ["schema"]])
def test_answers_without_torch_in_under_a_second(arguments: list[str]) -> None:
    done, seconds = fresh(*arguments)
    assert done.returncode == 0, done.stderr
    assert seconds < 1.0


def test_plan_answers_without_torch_in_under_a_second(tmp_path: Path) -> None:
    model = {"model_type": "t5", "vocab_size": 100, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**model, "num_heads": 3}))
    run_file = write_run_file(tmp_path)
    done, seconds = fresh("plan", str(run_file), f"model.path={tmp_path}", "--devices", "4", "--device-memory", "1GiB")
    assert done.returncode == 0, done.stderr
    assert "recommended preset: zero0" in done.stdout
    assert seconds < 1.0


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "example" in out
    assert f"harness {verb}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("harness ")


def pretend(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `harness schema` raise ``error``."""

    def run(args: object) -> int:
        raise error

    from harness.cli import schema

    monkeypatch.setattr(schema, "run", run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x", where="there", hint="do this"), 2),
        (DataError("x", where="there", hint="do this"), 3),
        (ResourceError("x", where="there", hint="do this"), 4),
        (NonFiniteError("x", where="there", hint="do this"), 5),
        (Interrupted("x", where="there", hint="do this"), 75),
        (HarnessError("x", where="there", hint="do this"), 1),
    ],
)
def test_user_errors_have_their_exit_codes_and_no_traceback(
    error: HarnessError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, error)
    assert main(["schema"]) == code
    kind = "harness" if code == ExitCode.INTERRUPTED else "error"
    assert capsys.readouterr().err == f"{kind}: there: x\n  -> do this\n"
    assert main(["schema", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_our_errors_are_short_unless_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, AssertionError("a\nb"))
    assert main(["schema"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: AssertionError: a b\n")
    assert "--debug" in err
    assert "Traceback" not in err
    assert main(["--debug", "schema"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_control_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, KeyboardInterrupt())
    assert main(["schema"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_plan_as_json_with_overrides_around_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = str(write_run_file(tmp_path))
    assert main(["plan", run_file, "optimizer.lr=1", "--devices", "4", "--nodes", "2", "seed=3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["world_size"] == 8
    assert (plan["config"]["optimizer"]["lr"], plan["config"]["seed"]) == (1, 3)
    assert plan["deepspeed"]["zero_optimization"]["stage"] == 2
    assert plan["num_parameters"] is None, "the model is not here"


def test_plan_as_text_says_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_run_file(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "4,096 tokens per step" in out
    assert "the config.json of no-such-org/no-such-model is not on this machine" in out
    assert '"stage": 2' in out


def test_schema_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--output", str(tmp_path / "s.json")]) == 0
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "s.json").read_text())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Twenty steps of a hundred, one evaluation, one checkpoint, and a line cut short."""
    records: list[dict[str, Any]] = [{"event": "start", "step": 0, "time_s": 0.0, "reason": "start", "world_size": 2}]
    records += [
        {"event": "step", "step": step, "time_s": 2.0 * step, "loss": 5.0 - step / 100, "tokens_per_second": 1234.5}
        for step in range(1, 21)
    ]
    scores = {"set": "validation", "loss": 4.0, "bleu": 12.5, "signature": "x", "sentences": 9}
    records.insert(11, {"event": "evaluation", "step": 10, "time_s": 21.0, **scores})
    records.insert(12, {"event": "checkpoint", "step": 10, "time_s": 22.0, "path": "step-00000010", "bytes": 7})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"event": "st')
    (tmp_path / "plan.json").write_text(json.dumps({"config": {"schedule": {"steps": 100}}}))
    return tmp_path


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.launch import run_directory

    monkeypatch.setattr(run_directory, "owner", lambda run_dir: "pid 7 on here")


@pytest.mark.usefixtures("at_work")
def test_status_of_a_running_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run_dir), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "running: pid 7 on here"
    assert (status["step"], status["steps"], status["checkpoint_step"]) == (20, 100, 10)
    assert status["remaining_s"] == pytest.approx(160.0)
    assert main(["status", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "step        20 of 100 (20%)" in out
    assert "loss 4.8" in out
    assert "remaining   about 3 min" in out
    assert "step 10, validation: loss 4, bleu 12.5" in out


def test_status_of_runs_that_do_not_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> str:
        assert main(["status", str(run_dir), "--json"]) == 0
        found: str = json.loads(capsys.readouterr().out)["state"]
        return found

    assert state().startswith("not running")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('\n{"event": "stop", "step": 20, "time_s": 50, "reason": "SIGTERM"}\n')
    assert state() == "stopped: SIGTERM"
    (run_dir / "summary.json").write_text("{}")
    assert state() == "finished"


def test_status_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert main(["status", str(tmp_path)]) == 0
    assert "step        0" in capsys.readouterr().out


@pytest.mark.usefixtures("at_work")
def test_stop_leaves_a_request(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from harness.training.stop import StopRequest

    request = StopRequest(run_dir)
    assert not request.wanted()
    assert main(["stop", str(run_dir)]) == 0
    assert "pid 7 on here" in capsys.readouterr().out
    assert request.wanted()
    assert main(["status", str(run_dir)]) == 0
    assert "asked to stop" in capsys.readouterr().out


def test_stop_of_a_run_that_does_not_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", str(run_dir)]) == 0
    assert "not running" in capsys.readouterr().out
    assert not (run_dir / "stop").exists()


def test_doctor_finds_the_lock_of_a_killed_compilation(tmp_path: Path) -> None:
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    assert [finding.verdict for finding in doctor.extension_locks(tmp_path, compiling=False)] == ["ok"]
    (tmp_path / "py311_cpu" / "cpu_adam" / "lock").touch()
    (stale,) = doctor.extension_locks(tmp_path, compiling=False)
    assert stale.verdict == "fail"
    assert "cpu_adam/lock" in stale.text
    (busy,) = doctor.extension_locks(tmp_path, compiling=True)
    assert busy.verdict == "note"


def test_doctor_compares_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {finding.verdict for finding in doctor.versions()} == {"ok"}
    wanted = ["torch>=999", "no-such-package>=1", 'pytest>=1; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    assert [finding.verdict for finding in doctor.versions()] == ["ok", "fail", "fail"]


def test_doctor_reports_and_fails_on_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [doctor.Finding("ok", "a"), doctor.Finding("note", "b")]
    monkeypatch.setattr(doctor, "findings", lambda build_ops: iter(found))
    assert main(["doctor"]) == 0
    found.append(doctor.Finding("fail", "c"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "fail  c"


@pytest.mark.slow
def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.loopback().verdict == "ok"
    assert doctor.all_reduce() == doctor.Finding("ok", "2-process all-reduce (gloo, file store)")
