"""`harness status`, `logs` and `compare`: what they make of the files of a run."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from harness.launch.failures import PEER_LOST
from tests.runs import tiny_run, write_run


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(directory: Path, *, config: dict[str, Any] | None = None, num_steps: int = 20) -> Path:
    """A run of 100 steps, two seconds each."""
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps({"config": config or {"schedule": {"steps": 100}}}))
    start = {"event": "start", "step": 0, "time_s": 0.0, "reason": "from the beginning"}
    steps = [{"event": "step", "step": step, "time_s": 2.0 * step, "loss": 4.0} for step in range(1, num_steps + 1)]
    write_lines(directory / "metrics.jsonl", [start, *steps])
    return directory


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness.cluster.submission  # noqa: F401 - else it may be imported later, and keep the replacement
    from harness.launch import run_directory

    monkeypatch.setattr(run_directory, "owner", lambda run_dir: "pid 7 on here")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize(("every", "step", "seconds"), [(50, 50, 60.0), (20, 40, 40.0), (None, 100, 160.0)])
def test_status_tells_the_next_checkpoint(
    every: int | None, step: int, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", config={"schedule": {"steps": 100}, "checkpoint": {"every_steps": every}})
    status = json.loads(shown(capsys, "status", run_dir, "--json"))
    assert (status["next_checkpoint_step"], status["next_checkpoint_s"]) == (step, seconds)
    assert f"next        checkpoint at step {step}, in about" in shown(capsys, "status", run_dir)


@pytest.mark.usefixtures("at_work")
def test_status_shows_the_oldest_signs_of_life(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {
        str(rank): {"host": f"node{rank // 4}", "phase": "step", "step": 20, "age_s": float(rank)} for rank in range(10)
    }
    ranks["8"] |= {"phase": "load", "step": None}
    (run_dir / "pulses.json").write_text(json.dumps({"time": time.time() - 30, "ranks": ranks}))
    lines = [line for line in shown(capsys, "status", run_dir).splitlines() if "alive" in line or "newer" in line]
    assert lines[0].startswith("rank 9      alive 39 s ago on node2: step after step 20")
    assert lines[1].startswith("rank 8      alive 38 s ago on node2: load")
    assert len(lines) == 9
    assert "and 2 ranks with a newer sign of life" in lines[-1]


def test_status_tells_starts_and_the_last_end(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = {"event": "end", "step": 20, "exit_code": 75, "reason": "time limit: stopped on request, saved"}
    write_lines(run_dir / "launches.jsonl", [{"event": "start"}, end, {"event": "start"}])
    out = shown(capsys, "status", run_dir)
    assert "starts      2; the last end: time limit: stopped on request, saved" in out
    assert "alive" not in out, "pulses of a run that does not run say nothing"


def test_steps_before_a_restart_do_not_count_for_speed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "restart", "step": 20, "time_s": 10_000.0}) + "\n")
    status = json.loads(shown(capsys, "status", run_dir, "--json"))
    assert status["remaining_s"] is None
    assert status["last_step"] is None


def write_error(run_dir: Path, rank: int, **changes: Any) -> None:
    record = {"rank": rank, "host": f"node{rank}", "time": 100.0 + rank, "exit_code": 1, "kind": "RuntimeError"}
    (run_dir / "errors" / "previous").mkdir(parents=True, exist_ok=True)
    (run_dir / "errors" / f"rank-{rank}.json").write_text(json.dumps(record | changes))


def test_logs_finds_the_cause_among_its_echoes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_error(run_dir, 0, message="connection closed by peer", kind=PEER_LOST)
    write_error(run_dir, 2, message="index out of range", step=12, traceback="Traceback\n  in collate")
    write_error(run_dir, 3, message="later")
    write_error(run_dir, 4, message="stopped", exit_code=75)
    (run_dir / "errors" / "rank-5.json").write_text('{"torn')
    lines = shown(capsys, "logs", run_dir).splitlines()
    assert lines[0].startswith("rank 2 on node2, step 12, ")
    assert lines[0].endswith(": index out of range")
    assert "    in collate" in lines
    assert [line.split(",")[0] for line in lines[3:]] == ["then  rank 3 on node3", "then  rank 0 on node0"]


def test_logs_shows_the_lines_around_an_error(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"line {number}" for number in range(100)]
    lines[50] = "error: rows changed"
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank-1.log").write_text("\n".join(lines))
    write_error(run_dir, 1, message="rows changed")
    out = shown(capsys, "logs", run_dir)
    assert "line 45" in out
    assert "line 55" in out
    assert "line 5\n" not in out
    assert "line 90" not in out


def test_logs_of_a_killed_rank_shows_the_end_of_its_log(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank-1.log").write_text("\n".join(f"line {number}" for number in range(100)))
    end = {"event": "end", "exit_code": 1, "reason": "rank 1 was killed by SIGKILL after step 12"}
    write_lines(run_dir / "launches.jsonl", [{"event": "start"}, end])
    (run_dir / "errors").mkdir()
    (run_dir / "errors" / "rank-1.stack").write_text("Thread 1")
    out = shown(capsys, "logs", run_dir)
    assert out.startswith("the run ended with exit code 1: rank 1 was killed by SIGKILL after step 12")
    assert "line 99" in out
    assert f"where rank 1 stood when it was killed: {run_dir / 'errors' / 'rank-1.stack'}" in out


def test_logs_of_a_run_that_was_started_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_error(run_dir, 1, message="rows changed")
    (run_dir / "errors" / "rank-1.json").rename((run_dir / "errors" / "previous") / "rank-1.json")
    end = {"event": "end", "exit_code": 1, "reason": "rank 1: rows changed"}
    write_lines(run_dir / "launches.jsonl", [{"event": "start"}, end, {"event": "start"}])
    lines = shown(capsys, "logs", run_dir).splitlines()
    assert lines[0] == "an earlier start ended with exit code 1: rank 1: rows changed"
    assert lines[1].endswith(": rows changed")


def test_logs_of_a_run_without_errors(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(run_dir / "launches.jsonl", [{"event": "start"}, {"event": "end", "exit_code": 0, "reason": "done"}])
    assert "has left an error" in shown(capsys, "logs", run_dir)


def test_logs_of_one_rank(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank-3.log").write_text("a\nb\nc\n")
    assert shown(capsys, "logs", run_dir, "--rank", "3", "--lines", "2") == "b\nc\n"
    assert main(["logs", str(run_dir), "--rank", "4"]) == 2
    assert "there are logs of ranks 3 to 3" in capsys.readouterr().err


def test_logs_follows_until_interrupted(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_dir / "logs" / "rank-0.log"
    log.parent.mkdir()
    log.write_text("a\n")

    def sleep(seconds: float) -> None:
        if "c" in log.read_text():
            raise KeyboardInterrupt
        log.write_text(log.read_text() + "b\nc\n")

    monkeypatch.setattr(time, "sleep", sleep)
    assert shown(capsys, "logs", run_dir, "--rank", "0", "--follow") == "a\nb\nc\n"


def test_compare_shows_differences_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lr, scores in (("a", 1e-3, [10.0, 12.5, 11.0]), ("b", 1e-4, [8.0, 9.0, 9.5])):
        config = {"name": name, "seed": 17, "optimizer": {"lr": lr}, "data": {"train": [{"path": "x.tsv"}]}}
        run_dir = make_run(tmp_path / name, config=config)
        with (run_dir / "metrics.jsonl").open("a") as file:
            for step, bleu in enumerate(scores, 1):
                record = {"event": "evaluation", "set": "validation", "step": step, "bleu": bleu, "loss": -bleu}
                file.write(json.dumps(record) + "\n")
    speed = {"tokens_per_second": 1234.5, "wall_time_s": 7200.0, "restarts": 1}
    summary = {"exported_step": 2, "test": {"bleu": 12.25}, **speed}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    rows = {
        line.split("  ")[0]: line.split()[-2:]
        for line in shown(capsys, "compare", tmp_path / "a", tmp_path / "b").splitlines()
    }
    assert rows["optimizer.lr"] == ["0.001", "0.0001"]
    assert rows["test bleu"] == ["12.25", "-"]
    assert rows["last bleu"] == ["11", "9.5"]
    assert rows["restarts"] == ["1", "-"]
    assert not {"name", "seed", "data.train.0.path"} & rows.keys()
    out = shown(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert "12.5 at 2" in out
    assert "9.5 at 3" in out
    assert "-12.5 at 2" in out, "of a loss the least is best"


def test_compare_shows_a_run_whose_loss_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, config={}) for name in ("a", "b")]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 9, "loss": null}\n')
    [line] = [line for line in shown(capsys, "compare", *runs).splitlines() if line.startswith("training loss")]
    assert line.endswith("not finite")


def test_compare_of_many_runs_has_a_line_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / f"r{seed}", config={"seed": seed}) for seed in range(12)]
    lines = shown(capsys, "compare", *runs).splitlines()
    assert lines[0].split()[0] == "seed"
    assert [line.split()[:2] for line in lines[1:]] == [[f"r{seed}", str(seed)] for seed in range(12)]


def test_compare_needs_two_runs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run_dir)]) == 2
    assert "name two run directories" in capsys.readouterr().err


def only_bash(tmp_path: Path) -> str:
    """A PATH without Slurm's commands."""
    found = shutil.which("bash")
    assert found is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(found)
    return str(tmp_path / "bin")


def rehearsed(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], **slurm: Any) -> tuple[str, str]:
    """What `harness rehearse` prints, on standard output and error; there is a problem."""
    run_file = write_run(tiny_run(tmp_path, model, name="real", slurm=slurm or None))
    assert main(["rehearse", str(run_file)]) == 2
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_rehearse_needs_a_job(tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert "the run file has no section `slurm`" in rehearsed(tmp_path, tiny_models["t5"], capsys)[1]


def test_rehearse_without_slurm_says_where_to_call_it(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", only_bash(tmp_path))
    out, _ = rehearsed(tmp_path, tiny_models["t5"], capsys, nodes=2)
    assert "problem  Slurm would not take the training job: sbatch is not on this machine" in out
    assert "-> use a login node of the cluster" in out
    assert out.splitlines()[-1] == "not ready: mend this and rehearse again"


def test_rehearse_removes_only_rehearsals(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", only_bash(tmp_path))
    kept = tmp_path / "real-rehearsal" / "plan.json"
    kept.parent.mkdir()
    kept.touch()
    assert "this is not one" in rehearsed(tmp_path, tiny_models["t5"], capsys, nodes=2)[1]
    assert kept.exists()
    (kept.parent / "probe").mkdir()
    rehearsed(tmp_path, tiny_models["t5"], capsys, nodes=2)
    assert not kept.parent.exists()
