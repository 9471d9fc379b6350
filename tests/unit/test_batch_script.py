"""The sbatch scripts: golden files, shellcheck, and no way for a value of the user's out of its place.

After a change that is meant: `python -m tests.unit.test_batch_script` writes the golden files anew (and
`python -m slurm.render` the templates).
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli.main import main
from harness.cluster.batch_script import (
    Place,
    directive_value,
    evaluation_script,
    sweep_overrides,
    training_script,
)
from harness.config.launch_rules import seconds_of
from harness.config.load import load_run_config
from harness.config.schema import RunConfig
from harness.errors import ConfigError
from slurm.render import templates
from tests.run_files import write_run_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/slurm"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
PLACE = Place(["/opt/harness/bin/python", "-m", "harness"], "/data/runs/enro", "/home/user/project")
ODD_PLACE = Place(
    ["/opt/my python/bin/python", "-m", "harness"], "/data/100% $(touch x)/'runs'/enro", '/home/a b/"quoted" #1'
)
EVERYTHING: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": "a100:4",
    "cpus_per_node": 32,
    "memory": "0",
    "time": "1-12",
    "account": "proj",
    "partition": "gpu",
    "qos": "long",
    "constraint": "[rack1|rack2]&ib",
    "reservation": "course",
    "options": ["--exclusive", "--mail-type=END,FAIL", '--comment="for the paper"'],
    "tasks": "device",
    "signal_before_s": 600,
    "modules": ["cuda/12.4", "gcc"],
    "setup": ["source .venv/bin/activate", "export HF_HOME=$SCRATCH/hf"],
    "container": ["apptainer", "exec", "--nv", "--bind", "/data sets:/data", "image.sif"],
    "evaluation": {"data": "data/new test.tsv", "gpus_per_node": 2, "memory": "64G", "arguments": ["--beam-size", "6"]},
}
SWEEP = {"optimizer.lr": [1e-4, 3e-5], "deepspeed.preset": ["zero1", "no: $HOME; 'x'"], "early_stopping": [None]}
ODD_OVERRIDES = ["data.source_prefix='; touch x #", "data.target_column=$(touch x)\n`touch x`"]


def config(directory: Path, slurm: dict[str, Any], *overrides: str) -> RunConfig:
    run_file = write_run_file(directory)
    return load_run_config(run_file, [f"slurm={json.dumps(slurm)}", *overrides], accelerator="cuda")


def rendered(directory: Path) -> dict[str, str]:
    """The golden scripts by file name."""
    everything = config(directory, EVERYTHING)
    sweep = config(directory, {"sweep": SWEEP, "max_parallel": 2, "evaluation": {}, "time": "90"})
    return {
        "everything.sbatch": training_script(everything, PLACE, "run.yaml", ["optimizer.lr=1e-4"]),
        "everything-evaluation.sbatch": evaluation_script(everything, PLACE),
        "odd-names.sbatch": training_script(config(directory, {"nodes": 2}), ODD_PLACE, "my 'run'.yaml", ODD_OVERRIDES),
        "array.sbatch": training_script(sweep, PLACE, "run.yaml", tasks=[0, 1, 3]),
        "array-evaluation.sbatch": evaluation_script(sweep, ODD_PLACE),
        "two-nodes-one-large.sbatch": training_script(
            config(directory, {"nodes": 2, "first_node_memory": "900G", "memory": "100G"}), PLACE, "run.yaml"
        ),
    }


NAMES = [path.name for path in sorted(GOLDEN.glob("*.sbatch"))]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, tmp_path: Path) -> None:
    assert rendered(tmp_path)[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_every_script_has_its_golden_file(tmp_path: Path) -> None:
    assert sorted(rendered(tmp_path)) == NAMES


def test_templates_are_what_is_rendered() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "slurm").glob("*.sbatch")}
    assert templates() == files


def test_shellcheck_has_nothing_to_say() -> None:
    # Golden scripts hold values that look like expansions and are none (SC2016), and source what is not here (SC1091).
    for excluded, scripts in (
        ("", [*ROOT.glob("slurm/*.sbatch"), *ROOT.glob("launch/*.sh")]),
        ("SC1091,SC2016", [*GOLDEN.glob("*.sbatch")]),
    ):
        assert len(scripts) >= 6
        command = [SHELLCHECK, f"--exclude={excluded}", *scripts]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


def run_with_words_shown(script: str, directory: Path, **variables: str) -> list[str]:
    """The words of the command that the script ends in, without what must be there before."""
    lines = [line for line in script.splitlines() if not line.startswith(("module load", "source "))]
    text = re.sub(r"^exec .*?(?= (train|evaluate) )", "exec printf '%s\\\\0'", "\n".join(lines), flags=re.MULTILINE)
    shown = subprocess.run(
        ["bash"], input=text, cwd=directory, env=variables, capture_output=True, text=True, check=True
    )
    assert not [path.name for path in directory.iterdir() if path.name != "run.yaml"]
    return shown.stdout.split("\0")[:-1]


def test_values_reach_the_command_as_they_are(tmp_path: Path) -> None:
    words = run_with_words_shown(rendered(tmp_path)["odd-names.sbatch"], tmp_path)
    assert words == ["train", "my 'run'.yaml", *ODD_OVERRIDES, "launch.backend=slurm"]


def test_each_task_of_an_array_has_its_overrides(tmp_path: Path) -> None:
    scripts = rendered(tmp_path)
    words = run_with_words_shown(scripts["array.sbatch"], tmp_path, SLURM_ARRAY_TASK_ID="3")
    assert words[2:-1] == [
        "name=enro-3",
        "optimizer.lr=3e-05",
        """deepspeed.preset="no: $HOME; 'x'\"""",
        "early_stopping=null",
    ]
    words = run_with_words_shown(scripts["array-evaluation.sbatch"], tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert words == ["evaluate", f"{ODD_PLACE.run_dir}-1"]


def test_overrides_of_a_sweep_are_read_back_as_its_values(tmp_path: Path) -> None:
    values = ["1e-4", "no", "a: b", "null", "0x10", "- x", "", "'", '"', "ü\n\t\x07", "#", " x "]
    sweep = config(tmp_path, {"sweep": {"data.source_prefix": values}})
    overrides = sweep_overrides(sweep)
    assert [config(tmp_path, {}, *task).data.source_prefix for task in overrides] == values
    assert [config(tmp_path, {}, *task).name for task in overrides][:2] == ["enro-0", "enro-1"]


@given(st.text(st.characters(blacklist_categories=["Cc", "Cs"])))
def test_directive_values_are_read_back_by_the_rules_of_sbatch(value: str) -> None:
    assert sbatch_words(f"--x={directive_value(value)} --y") == [f"--x={value}", "--y"]


def sbatch_words(line: str) -> list[str]:
    """How sbatch (src/sbatch/opt.c, _get_argument) cuts up what follows #SBATCH."""
    words, word, quote, is_escaped = [], "", "", False
    for character in f"{line} ":
        if is_escaped:
            word, is_escaped = word + character, False
        elif character == "\\":
            is_escaped = True
        elif quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        elif character == " ":
            words, word = [*words, word], ""
        else:
            word += character
    return words


@pytest.mark.parametrize(("directory", "run_dir"), [("/a\nb", "/x"), ("/a", "/x\r#SBATCH --wrap=y"), ("/a", "/b\\c")])
def test_paths_that_no_directive_can_hold_are_refused(directory: str, run_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        training_script(config(tmp_path, {}), Place(["harness"], run_dir, directory), "run.yaml")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("0-0:0:5", 5)],
)
def test_time_limits(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds


PROBLEMS: list[tuple[dict[str, Any], list[str], str, str]] = [
    ({"gpus_per_node": "a100"}, [], "slurm.gpus_per_node", "like a100:8, got a100"),
    ({"gpus_per_node": 2}, ["launch.processes=4"], "launch.processes", "lower it to 2"),
    ({"cpus_per_node": 3}, ["launch.processes=4"], "slurm.cpus_per_node", "raise it to 4"),
    ({"first_node_memory": "8G"}, [], "slurm.first_node_memory", "only one node"),
    ({"time": "0:05:30"}, [], "slurm.signal_before_s", "before its limit of 330 s"),
    ({"options": ["exclusive"]}, [], "slurm.options.0", "must be an option"),
    ({"options": ['--comment="x']}, [], "slurm.options.0", "not complete"),
    ({"options": ["-N2"]}, [], "slurm.options.0", "set that instead"),
    ({"options": ["--output=x"]}, [], "slurm.options.0", "`output_dir`"),
    ({"options": ["--no-requeue"]}, [], "slurm.options.0", "remove it"),
    ({"options": ["--x=1\n#SBATCH -y"]}, [], "slurm.options.0", "must be one line"),
    ({"partition": "a b"}, [], "slurm.partition", "must be one word"),
    ({"time": "1 day"}, [], "slurm.time", "must be a time limit like"),
    ({"srun_options": ["mpi=none"]}, [], "slurm.srun_options.0", "must be an option"),
    ({"setup": ["echo \\"]}, [], "slurm.setup.0", "takes in the next line"),
    ({"max_parallel": 2}, [], "slurm.max_parallel", "without `slurm.sweep`"),
    ({"sweep": {"seed": []}}, [], "slurm.sweep", "seed has no values"),
    ({"sweep": {"slurm.nodes": [1, 2]}}, [], "slurm.sweep", "the same for all tasks"),
    ({"sweep": {"seed": list(range(1002))}}, [], "slurm.sweep", "1002 combinations"),
    ({"nodes": 2, "first_node_memory": "8G", "sweep": {"seed": [1]}}, [], "slurm.first_node_memory", "no arrays"),
    ({"evaluation": {}}, ["data.validation=null", "evaluation=null"], "slurm.evaluation", "no rows to score"),
    ({"evaluation": {"gpus_per_node": "x:0"}}, [], "slurm.evaluation.gpus_per_node", "must be a number"),
    ({}, ["launch.backend=ssh"], "launch.backend", "`launch.hostfile`"),
    ({}, ["launch.hostfile=x"], "launch.hostfile", "remove it, or set that to ssh"),
    ({}, ["launch.environment={RANK: '1'}"], "launch.environment.RANK", "for each rank"),
]


@pytest.mark.parametrize(("slurm", "overrides", "key", "says"), PROBLEMS)
def test_contradictions(slurm: dict[str, Any], overrides: list[str], key: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, slurm, *overrides)
    assert f"{key}: " in str(caught.value)
    assert says in str(caught.value)


def test_dry_run_prints_the_scripts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = write_run_file(tmp_path, ("output_dir: runs", f"output_dir: {tmp_path}/runs"))
    slurm = {"nodes": 2, "gpus_per_node": 4, "evaluation": {}}
    assert main(["submit", str(run_file), f"slurm={json.dumps(slurm)}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"#SBATCH --output={tmp_path}/runs/enro/slurm-%j.out\n" in shown
    assert f"\n    set -- {run_file} {shlex.quote(f'slurm={json.dumps(slurm)}')}\n" in shown
    assert "# sbatch --dependency=afterok:TRAINING_JOB\n" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ("null", "no section `slurm`"),
        ('{setup: ["if true; then"]}', "slurm.setup: is not complete shell code"),
        ("{sweep: {optimizer.lr: [1e-4, -1]}}", "override 'optimizer.lr=-1': optimizer.lr: must be greater than 0"),
        ("{sweep: {optimizr.lr: [1]}}", "did you mean `optimizer`?"),
    ],
)
def test_submit_checks_everything_first(
    slurm: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(write_run_file(tmp_path)), f"slurm={slurm}"]) == 2
    assert says in capsys.readouterr().err


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for file_name, script in rendered(Path(folder)).items():
            (GOLDEN / file_name).write_text(script, encoding="utf-8")
