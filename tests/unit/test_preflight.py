"""What is said of a job before it queues, and of what the probes of its nodes have found."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import RunConfig
from harness.launch import probe
from harness.launch.preflight import Finding, measured_times, time_limit
from harness.launch.probe_report import judge
from harness.plan.plan import Plan, make_plan
from tests.runs import tiny_run

GIB = 2**30


@pytest.fixture
def run(tmp_path: Path, tiny_models: dict[str, Path]) -> dict[str, Any]:
    slurm = {"nodes": 2, "gpus_per_node": 2, "time": "01:00:00", "signal_before_s": 300}
    return tiny_run(tmp_path, tiny_models["mbart"], name="real", slurm=slurm)


def plan_of(run: dict[str, Any]) -> Plan:
    return make_plan(RunConfig.model_validate(run), world_size=4)


def problems(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.is_problem]


def test_speed_is_that_of_steps_in_a_row() -> None:
    times = [(1, 10.0), (2, 12.0), (3, 14.0), (3, 500.0), (4, 502.0)]  # a restart from step 2 in between
    records: list[dict[str, Any]] = [{"event": "step", "step": step, "time_s": time} for step, time in times]
    records += [{"event": "checkpoint", "step": 3, "seconds": seconds} for seconds in (4.0, 9.0, 5.0)]
    assert measured_times(records) == (2.0, 9.0)
    assert measured_times([]) == (None, None)


@pytest.mark.parametrize(
    ("step_s", "every", "is_reached"), [(3.0, 1000, True), (3.5, 1000, False), (0.1, 40_000, False)]
)
def test_checkpoint_must_be_reached_within_one_start(
    step_s: float, every: int, is_reached: bool, run: dict[str, Any]
) -> None:
    run["checkpoint"] = {"every_steps": every}
    found = problems(time_limit(plan_of(run), step_s, None))
    assert len(found) == (not is_reached)
    assert all("54 min are left before the signal" in finding.text for finding in found)  # 60 less 5 less 1 of slack
    assert all("slurm.time above 01:00:00" in finding.change for finding in found)


def test_without_a_measurement_only_what_no_device_can_do_is_a_problem(run: dict[str, Any]) -> None:
    run["checkpoint"] = {"every_steps": 1000}
    assert not problems(time_limit(plan_of(run), None, None))
    run["checkpoint"] = {"every_steps": 10**16}
    (found,) = problems(time_limit(plan_of(run), None, None))
    assert "fastest device" in found.text


def test_signal_must_come_before_a_save_of_the_measured_length(run: dict[str, Any]) -> None:
    (found,) = problems(time_limit(plan_of(run), 1.0, 400.0))
    assert "raise slurm.signal_before_s above 400" in found.change
    assert not problems(time_limit(plan_of(run), 1.0, 200.0))


def facts(host: str, **changes: Any) -> probe.Facts:
    """Those of a node on which everything is right."""
    right = {
        "host": host, "addresses": {"lo": "127.0.0.1", "ib0": "10.0.0.1"}, "python": "3.11.7", "harness": "0.1.0",
        "executable": "/env/bin/python", "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "run_dir": {"problem": None, "free_bytes": GIB}, "node_local_dir": None, "unreadable": {}, "gpus": 2,
        "memory_bytes": 64 * GIB, "open_files": 4096, "cores": 8, "seen": [0, 1], "unreachable": [],
        "clock_offset_s": 0.01,
    }  # fmt: skip
    return right | changes


def test_right_nodes_have_no_problem(run: dict[str, Any]) -> None:
    config = RunConfig.model_validate(run | {"launch": {"interface": "ib0"}})
    assert not problems(judge({0: facts("a"), 1: facts("b")}, config, host_bytes=GIB))


@pytest.mark.parametrize(
    ("changes", "told", "change"),
    [
        ({"python": "3.12.1"}, "b has Python 3.12.1", "same environment"),
        ({"harness": "0.0.9"}, "harness 0.0.9", "same environment"),
        ({"packages": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "2.12.0", "constraints.txt"),
        ({"run_dir": {"problem": "Read-only file system", "free_bytes": None}}, "cannot be written on b", "output_dir"),
        ({"seen": [1]}, "b does not see what a writes", "that all nodes share"),
        ({"unreadable": {"/data/x.tsv": "Permission denied"}}, "/data/x.tsv cannot be read on b", "every node"),
        ({"gpus": 1}, "b gives the job 1 GPUs", "slurm.gpus_per_node"),
        ({"memory_bytes": GIB // 2}, "b gives the job 512 MiB", "slurm.memory above 1 GiB"),
        ({"cores": 1}, "1 cores for 2 ranks", "slurm.cpus_per_node"),
        ({"open_files": 256}, "b allows 256 open files", "ulimit -n"),
        ({"addresses": {"lo": "127.0.0.1", "eth0": "10.0.0.2"}}, "ib0 does not exist on b", "one of eth0"),
        ({"unreachable": [("a (10.0.0.1)", 20001, "timed out")]}, "b cannot reach a (10.0.0.1) on port 20001", "TCP"),
        ({"clock_offset_s": -61.0}, "clock of b differs from a's by -61.0 s", "NTP"),
        ({"node_local_dir": {"problem": "No space left", "free_bytes": 0}}, "cannot be used on b", "every node"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_wrong_on_one_node_is_told(
    changes: dict[str, Any], told: str, change: str, run: dict[str, Any]
) -> None:
    config = RunConfig.model_validate(run | {"launch": {"interface": "ib0", "node_local_dir": "/scratch"}})
    (found,) = problems(judge({0: facts("a"), 1: facts("b", **changes)}, config, host_bytes=GIB))
    assert told in found.text
    assert change in found.change


def test_missing_packages_are_told_once(run: dict[str, Any]) -> None:
    nodes = {number: facts(host, packages={"torch": None}) for number, host in enumerate("ab")}
    (found,) = problems(judge(nodes, RunConfig.model_validate(run), host_bytes=0))
    assert "torch" in found.text
    assert "/env/bin/python" in found.change


def test_probe_reaches_who_listens_and_measures_the_clock() -> None:
    with socket.create_server(("", 0)) as closed:
        gone = closed.getsockname()[1]
    with probe.listener(0) as server:
        port = server.getsockname()[1]
        here = {"host": "here", "address": "127.0.0.1", "ports": [port, gone]}
        unreachable, offset_s = probe.reach({0: here})
    assert [(target, cut) for target, cut, _ in unreachable] == [("here (127.0.0.1)", gone)]
    assert offset_s is not None
    assert abs(offset_s) < 1.0


def test_probe_says_why_a_file_or_directory_is_of_no_use(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("x")
    assert probe.read_problem(tmp_path / "rows.tsv") is None
    assert probe.read_problem(tmp_path) is None
    assert probe.read_problem(tmp_path / "none.tsv") == "No such file or directory"
    assert probe.directory_facts(tmp_path / "new")["problem"] is None
    assert probe.directory_facts(tmp_path / "rows.tsv")["problem"] == "File exists"
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("GPU-1f", 1), ("", 0), ("NoDevFiles", 0)])
def test_probe_counts_the_gpus_that_slurm_gives(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probe.visible_gpus() == count


def test_probe_waits_for_the_others_no_longer_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_PATIENCE_S", 0.0)
    for number in range(2):
        probe.write(tmp_path / f"hello-{number}.json", {"host": str(number)})
    assert probe.arrivals(tmp_path, "hello", [0, 1]) == {}
    monkeypatch.setattr(probe, "_PATIENCE_S", 30.0)
    assert sorted(probe.arrivals(tmp_path, "hello", range(2))) == [0, 1]
    assert json.loads((tmp_path / "hello-1.json").read_text()) == {"host": "1"}
