"""``python -m harness.cluster.probe_job DIRECTORY ...``: what the script of a probing job starts on its first node.

It starts the probe on every node as training starts its supervisors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness.cluster.allocation import current_allocation
from harness.cluster.slurm import step_on
from harness.config.launch_schema import SlurmConfig
from harness.io.atomic import write_json

HOSTS_FILE = "hosts.json"  # once it is there, modules and setup of the script have worked


def main(directory: Path) -> int:
    slurm = SlurmConfig.model_validate(json.loads((directory / "request.json").read_text())["slurm"])
    hosts = current_allocation().hosts
    write_json(directory / HOSTS_FILE, [host.name for host in hosts])
    within = [*slurm.container, "python" if slurm.container else sys.executable]
    probe = [*within, "-m", "harness.cluster.probe", str(directory)]
    steps = [
        subprocess.Popen([*step_on(host, slurm), *probe, str(number)], stdin=subprocess.DEVNULL)
        for number, host in enumerate(hosts)
    ]
    return max([abs(step.wait()) for step in steps])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
