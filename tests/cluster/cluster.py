"""The cluster of cluster.sh for Python: commands on its hosts, Slurm jobs, faults, and what is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

SCRIPT = Path(__file__).with_name("cluster.sh")
HEAD = "head"
_DAEMONS = re.compile(r"bash \S*cluster\.sh init |munged |sshd: |slurmctld|: slurmscriptd|slurmd |ps -e ")
_FINAL_STATES = {"COMPLETED", "FAILED", "TIMEOUT"}  # others may be followed by a requeue


class Unavailable(Exception):
    """No cluster can be made on this machine."""


class Process(NamedTuple):
    """A process of a host; `pid` is its number there."""

    pid: int
    arguments: str


class HostCommand(subprocess.Popen[str]):
    """A command on a host. nsenter waits for it, ends as it ends, and passes no signal on: so this does."""

    def send_signal(self, sig: int) -> None:
        commands = psutil.Process(self.pid).children() if self.poll() is None else []
        for command in commands:
            command.send_signal(sig)

    def last_words(self) -> str | None:
        """None while it runs, then its exit code and what it has printed."""
        return None if self.poll() is None else f"exit code {self.returncode}\n{''.join(self.communicate())}"


class Cluster:
    """head and node1 .. nodeN, from the constructor to `close` or the end of this process, whatever ends it.

    `shared` and everything below it is the same on all hosts, and so is the machine's disk except /tmp, /run and
    /dev/shm. `directory` keeps the logs. Unavailable if packages or rights are missing.
    """

    def __init__(self, directory: Path, shared: Path, num_nodes: int) -> None:
        self.shared, self.hosts = shared, [f"node{number}" for number in range(1, num_nodes + 1)]
        self.directory = directory
        self._environment = os.environ | {"CLUSTER_DIR": str(directory), "CLUSTER_SHARED": str(shared)}
        self._powered_off: set[str] = set()
        self._cut: set[str] = set()
        installed = subprocess.run([SCRIPT, "install"], capture_output=True, text=True, check=False)
        if installed.returncode != 0:
            raise Unavailable(installed.stderr.strip())
        self._holder = subprocess.Popen(
            [SCRIPT, "hold", str(num_nodes)],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the tests, which then close the cluster
            text=True,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise RuntimeError("the cluster does not start: see standard error")

    def close(self) -> None:
        self._holder.communicate(timeout=60)

    def start(self, host: str, *command: str | Path, cwd: Path | None = None, **variables: str) -> HostCommand:
        """`command` on `host` in `cwd` (default: `shared`), with the environment of the tests and `variables`."""
        return HostCommand(
            [str(SCRIPT), "exec", host, *map(str, command)],
            cwd=cwd or self.shared,
            env=self._environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        host: str,
        *command: str | Path,
        check: bool = True,
        timeout_s: float = 60.0,
        cwd: Path | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Wait for `command`; AssertionError with its output if it fails and `check` is set."""
        process = self.start(host, *command, cwd=cwd, **variables)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate(timeout=10)
            raise AssertionError(f"no end after {timeout_s} s: {command}\n{out}{err}") from None
        assert not check or process.returncode == 0, f"exit code {process.returncode}: {command}\n{out}{err}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def sbatch(self, script: Path, *options: str) -> str:
        """Submit a script on head, in the script's directory, and return the id of the job."""
        return self.run(HEAD, "sbatch", "--parsable", *options, script, cwd=script.parent).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, ExitCode, NodeList, StdOut ..."""
        shown = self.run(HEAD, "scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z]\S*=|\s*$)", shown))

    def wait_job(self, job_id: str, states: set[str], timeout_s: float = 120.0) -> dict[str, str]:
        """Wait until the job is in one of `states`; AssertionError when it ends in another one."""
        job = self.job(job_id)
        deadline = time.monotonic() + timeout_s
        while job["JobState"] not in states:
            is_over = time.monotonic() > deadline or job["JobState"] in _FINAL_STATES
            assert not is_over, f"{job}\n{_tail(Path(job['StdOut']))}"
            time.sleep(0.2)
            job = self.job(job_id)
        return job

    def power_off(self, host: str) -> None:
        """As if the plug were pulled: everything on the host is gone, and nobody is told."""
        self._script("poweroff", host)
        self._powered_off.add(host)

    def power_on(self, host: str) -> None:
        self._script("poweron", host)
        self._powered_off.discard(host)

    def cut_link(self, host: str) -> None:
        self._script("link", host, "down")
        self._cut.add(host)

    def restore_link(self, host: str) -> None:
        """Slurm hears of it at once; by itself it would take most of a minute."""
        self._script("link", host, "up")
        self.run(host, "pkill", "-HUP", "-x", "slurmd", check=False)
        self._cut.discard(host)

    def processes(self, host: str) -> list[Process]:
        """What runs on the host, the daemons of the cluster and their sessions aside."""
        lines = self.run(host, "ps", "-e", "-o", "pid=,args=").stdout.splitlines()
        found = [Process(int(pid), arguments) for pid, arguments in (line.split(None, 1) for line in lines)]
        return [process for process in found if not _DAEMONS.match(process.arguments)]

    def kill(self, host: str, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        self.run(host, "kill", f"-{int(number)}", str(pid))

    def leftovers(self, patience_s: float = 15.0) -> dict[str, list[Process]]:
        """{host: processes} of what does not end by itself in time; hosts without any are left out."""
        is_clean = wait_until(lambda: not self._running(), patience_s)
        return {} if is_clean else self._running()

    def restore(self) -> None:
        """Power and links are back everywhere."""
        for host in sorted(self._powered_off):
            self.power_on(host)
        for host in sorted(self._cut):
            self.restore_link(host)

    def settle(self) -> None:
        """No job, no process, all nodes idle, as at the start."""
        self.run(HEAD, "scancel", "--full", "--user=root")
        assert wait_until(self._is_idle, 60.0), self.run(HEAD, "sinfo", "-N", "-l").stdout
        for host, processes in self._running().items():
            for process in processes:
                self.run(host, "kill", "-9", str(process.pid), check=False)

    def _running(self) -> dict[str, list[Process]]:
        hosts = [host for host in (HEAD, *self.hosts) if host not in self._powered_off]
        return {host: processes for host in hosts if (processes := self.processes(host))}

    def _is_idle(self) -> bool:
        idle = self.run(HEAD, "sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").stdout.strip()
        return idle == str(len(self.hosts))

    def _script(self, *arguments: str) -> None:
        subprocess.run([SCRIPT, *arguments], env=self._environment, check=True, timeout=90)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """True as soon as the condition holds, False when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.is_file() else ""
