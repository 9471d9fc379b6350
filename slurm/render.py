"""``python -m slurm.render``: write the templates of this directory, which are what `harness submit` renders.

They can be used by hand, from the checkout: change the header, then
`sbatch slurm/multi-node.sbatch RUN.yaml [key.path=value ...]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config.load import load_run_config
from harness.launch.batch_script import Place, evaluation_script, training_script

DIRECTORY = Path(__file__).parent
RUN_FILE = "examples/quickstart.yaml"
PLACE = Place(command=[".venv/bin/harness"], run_dir="runs/quickstart", output_dir="")
_GPUS: dict[str, Any] = {"gpus_per_node": 8, "cpus_per_node": 64, "memory": "480G", "account": "my-account"}
TRAINING: dict[str, dict[str, Any]] = {
    "single-node": {**_GPUS},
    "multi-node": {**_GPUS, "nodes": 4},
    "array": {
        **_GPUS,
        "gpus_per_node": 1,
        "cpus_per_node": 8,
        "memory": "64G",
        "sweep": {"optimizer.lr": [3e-4, 1e-3], "seed": [17, 18]},
        "max_parallel": 2,
    },
    "heterogeneous": {**_GPUS, "nodes": 4, "first_node_memory": "960G"},
}
EVALUATION: dict[str, Any] = {**_GPUS, "evaluation": {"gpus_per_node": 1, "memory": "64G"}, "cpus_per_node": 8}


def templates() -> dict[str, str]:
    """The scripts by file name."""
    scripts = {}
    for name, section in TRAINING.items():
        scripts[f"{name}.sbatch"] = training_script(_config(section), PLACE, RUN_FILE)
    scripts["evaluation.sbatch"] = evaluation_script(_config(EVALUATION), PLACE)
    return scripts


def _config(section: dict[str, Any]) -> Any:
    overrides = [f"slurm={json.dumps(section)}", "launch.processes=auto"]
    return load_run_config(DIRECTORY.parent / RUN_FILE, overrides, accelerator="cuda")


if __name__ == "__main__":
    for file_name, text in templates().items():
        (DIRECTORY / file_name).write_text(text, encoding="utf-8")
