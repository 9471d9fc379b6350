"""`harness submit` on a real Slurm: the job trains as one machine does, arrays sweep, and evaluations come after."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import HEAD, Cluster
from tests.cluster.slurm_runs import final_checkpoint, launches, run_dir, slurm_run, submit, training_job
from tests.runs import REPOSITORY, harness, same_state, steps_of, write_run

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> dict[str, Any]:
    """The run as two ranks on one machine make it."""
    directory = tmp_path_factory.mktemp("local")
    run = slurm_run(directory, tiny_models["mbart"], name="local", slurm={}, launch__processes=2)
    done = harness("train", str(write_run(run)))
    assert done.returncode == 0, done.stderr
    return run


def assert_same_run(run: dict[str, Any], local: dict[str, Any]) -> None:
    """The same rows in the same order, and the same weights and moments bit for bit."""
    assert [step["row_digest"] for step in steps_of(run)] == [step["row_digest"] for step in steps_of(local)]
    assert same_state(final_checkpoint(run), final_checkpoint(local))


def test_two_nodes_train_as_one_machine_and_are_scored(
    cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path], local: dict[str, Any]
) -> None:
    odd = tmp_path / "100% a 'b' $c"  # %, blank, quotes and dollar: all names come through
    odd.mkdir()
    evaluation = {"data": str(odd / "pairs.tsv"), "arguments": ["--beam-size", "2"], "time": "0:05:00"}
    slurm = {"setup": ["export SETUP='a \"b\"'"], "evaluation": evaluation}
    run = slurm_run(odd, tiny_models["mbart"], name="two", slurm=slurm)
    printed = submit(cluster, run)
    job = training_job(printed)
    assert "2 ranks on 2 nodes" in printed
    again = cluster.run(HEAD, sys.executable, "-m", "harness", "submit", odd / "two.yaml", cwd=odd, check=False)
    assert again.returncode == 2
    assert f"job {job}, the training of this run, is " in again.stderr
    ended = cluster.wait_job(job, {"COMPLETED"})
    assert ended["NumNodes"] == "2"
    assert_same_run(run, local)
    assert [(one["event"], one["backend"], one["job_id"]) for one in launches(run)[:1]] == [
        ("start", "slurm", int(job))
    ]
    records = [json.loads(line) for line in (run_dir(run) / "jobs.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["training", "evaluation"]
    scored = cluster.wait_job(str(records[1]["job_id"]), {"COMPLETED"})
    assert scored["StartTime"] >= ended["EndTime"]
    assert list((run_dir(run) / "evaluations").glob("step-00000012-pairs-beam2/scores.json"))
    done = cluster.run(HEAD, sys.executable, "-m", "harness", "submit", odd / "two.yaml", cwd=odd)
    assert "is complete: 12 steps" in done.stdout


def test_ranks_as_tasks_of_slurm(
    cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path], local: dict[str, Any]
) -> None:
    slurm = {"nodes": 1, "tasks": "device", "gpus_per_node": 2, "cpus_per_node": 2}
    run = slurm_run(tmp_path, tiny_models["mbart"], name="tasks", slurm=slurm)
    cluster.wait_job(training_job(submit(cluster, run)), {"COMPLETED"})
    assert_same_run(run, local)


def test_first_node_with_more_memory_modules_and_a_container(
    cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path], local: dict[str, Any]
) -> None:
    (tmp_path / ".bash_profile").write_text('module() { echo "module $*"; }\n')  # a login shell knows it
    container, programs = tmp_path / "container.sh", Path(sys.executable).parent
    container.write_text(f'#!/bin/sh\necho "$(hostname) $*" >> {tmp_path}/contained\nPATH={programs}:$PATH exec "$@"\n')
    container.chmod(0o755)
    slurm = {"first_node_memory": "2000", "memory": "1000", "modules": ["cuda/12"], "container": [str(container)]}
    run = slurm_run(tmp_path, tiny_models["mbart"], name="uneven", slurm=slurm)
    job = training_job(submit(cluster, run, HOME=str(tmp_path)))
    cluster.wait_job(job, {"COMPLETED"})
    assert [cluster.job(f"{job}+{part}")["MinMemoryNode"] for part in (0, 1)] == ["2000M", "1000M"]
    assert "module load cuda/12\n" in (run_dir(run) / f"slurm-{job}.out").read_text()
    started = sorted((tmp_path / "contained").read_text().splitlines())
    assert started == [f"node{number} python -m harness.launch.node {number - 1}" for number in (1, 2)]
    assert_same_run(run, local)


def test_array_of_overrides_is_scored_task_by_task(
    cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    evaluation = {"data": str(tmp_path / "pairs.tsv"), "arguments": ["--beam-size", "1"], "time": "0:05:00"}
    sweep = {"optimizer.lr": [1e-3, 1e-4], "seed": [1, 2]}
    slurm = {"nodes": 1, "sweep": sweep, "max_parallel": 3, "evaluation": evaluation}
    run = slurm_run(tmp_path, tiny_models["mbart"], name="sweep", slurm=slurm, schedule__steps=5)
    submit(cluster, run)
    jobs = [json.loads(line)["job_id"] for line in (run_dir(run) / "jobs.jsonl").read_text().splitlines()]
    losses = []
    for index, (rate, seed) in enumerate([(1e-3, 1), (1e-3, 2), (1e-4, 1), (1e-4, 2)]):
        trained = cluster.wait_job(f"{jobs[0]}_{index}", {"COMPLETED"}, timeout_s=240)
        task = {**run, "name": f"sweep-{index}"}
        config = json.loads((run_dir(task) / "plan.json").read_text())["config"]
        assert (config["optimizer"]["lr"], config["seed"]) == (rate, seed)
        losses.append(steps_of(task)[-1]["loss"])
        scored = cluster.wait_job(f"{jobs[1]}_{index}", {"COMPLETED"}, timeout_s=240)
        assert scored["StartTime"] >= trained["EndTime"]
        assert (run_dir(task) / "evaluations/step-00000005-pairs-beam1/scores.json").is_file()
    assert len(set(losses)) == 4
    assert max(losses[:2]) < min(losses[2:])  # the higher rate has learnt more
    tasks = [run_dir({**run, "name": f"sweep-{index}"}) for index in range(4)]
    compared = [line.split() for line in harness("compare", *map(str, tasks)).stdout.splitlines()]
    assert ["optimizer.lr", "0.001", "0.001", "0.0001", "0.0001"] in compared
    assert ["seed", "1", "2", "1", "2"] in compared


def test_template_by_hand(
    cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path], local: dict[str, Any]
) -> None:
    """From the checkout, with options instead of another header."""
    run = slurm_run(tmp_path, tiny_models["mbart"], name="by-hand", slurm={}, launch__processes=1)
    header = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=1000", f"--output={tmp_path}/slurm-%j.out")
    command = ("sbatch", "--parsable", *header, "slurm/multi-node.sbatch", write_run(run), "checkpoint.keep_last=5")
    cluster.wait_job(cluster.run(HEAD, *command, cwd=REPOSITORY).stdout.strip(), {"COMPLETED"})
    assert json.loads((run_dir(run) / "plan.json").read_text())["config"]["checkpoint"]["keep_last"] == 5
    assert_same_run(run, local)


def test_slurm_says_what_it_would_do(cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    run = slurm_run(tmp_path, tiny_models["mbart"], name="test-only", slurm={})
    assert submit(cluster, run, "--test-only").startswith("training: Job ")
    refused = cluster.run(
        HEAD, sys.executable, "-m", "harness", "submit", tmp_path / "test-only.yaml", "slurm.nodes=99", "--test-only",
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "sbatch: allocation failure: More processors requested than permitted" in refused.stderr
    assert not run_dir(run).exists()
