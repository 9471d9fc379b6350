"""``harness doctor``: is this machine ready to train?"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

HELP = "Check versions, accelerator, compilers, compiled extensions, loopback network and a 2-process all-reduce."
EXAMPLE = "harness doctor --build-ops cpu_adam"

OPS = ("cpu_adam", "fused_adam", "async_io")
_ALL_REDUCE_LIMIT_S = 120
_COMPILERS = ("ninja", "cc1plus", "nvcc", "cicc")


class Finding(NamedTuple):
    """One line of the report; a ``fail`` makes the command exit 1."""

    verdict: Literal["ok", "note", "fail"]
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build-ops",
        nargs="*",
        choices=OPS,
        metavar="OP",
        help=f"compile DeepSpeed ops now, so that no rank has to: {', '.join(OPS)} (cpu_adam serves offload, "
        "fused_adam optimizer.implementation: deepspeed, async_io NVMe offload); without a name, cpu_adam",
    )


def run(args: argparse.Namespace) -> int:
    failed = False
    for finding in findings(args.build_ops):
        print(f"{finding.verdict:<5} {finding.text}", flush=True)
        failed |= finding.verdict == "fail"
    return int(failed)


def findings(build_ops: list[str] | None) -> Iterator[Finding]:
    """Every check, in the order in which they are printed."""
    yield from versions()
    yield from machine()
    yield from compilers()
    yield from extension_locks(extensions_directory(), compiling=_is_compiling())
    yield loopback()
    yield all_reduce()
    if build_ops is not None:
        yield from built_ops(build_ops or ["cpu_adam"])


def versions() -> Iterator[Finding]:
    """Python and the packages that pyproject.toml asks for, compared with what it asks."""
    yield Finding("ok", f"python {platform.python_version()}")
    for requirement in metadata.requires("harness") or []:
        if "extra ==" in requirement:
            continue
        name, floor = re.match(r"([A-Za-z0-9._-]+)\s*(?:>=([0-9.]+))?", requirement).groups()  # type: ignore[union-attr]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("fail", f"{name} is not installed: make setup")
            continue
        if floor and _numbers(version) < _numbers(floor):
            yield Finding("fail", f"{name} {version} is older than {floor}: make setup")
        else:
            yield Finding("ok", f"{name} {version}")


def machine() -> Iterator[Finding]:
    """Accelerator, cores, memory and disk."""
    from harness.io.accelerator import accelerator, host_memory_bytes, num_devices
    from harness.plan.advice import shown_bytes

    devices = f", {num_devices()} devices" if accelerator() == "cuda" else ""
    cores, memory = len(os.sched_getaffinity(0)), shown_bytes(host_memory_bytes())
    yield Finding("ok", f"accelerator {accelerator()}{devices}; {cores} cores, {memory} memory")
    free = shutil.disk_usage(".").free
    yield Finding("ok" if free > 5 * 2**30 else "note", f"{shown_bytes(free)} free on the disk of this directory")


def compilers() -> Iterator[Finding]:
    """What DeepSpeed needs to compile its ops (only for offload)."""
    path = _path_with_environment()
    for tool, use in (("g++", "optimizer offload"), ("ninja", "optimizer offload")):
        found = shutil.which(tool, path=path)
        yield Finding("ok", f"{tool}: {found}") if found else Finding("note", f"no {tool}: {use} cannot be compiled")
    if Path("/usr/include/libaio.h").is_file():
        yield Finding("ok", "libaio")
    else:
        yield Finding("note", "no libaio header: NVMe offload cannot be compiled (apt-get install libaio-dev)")


def extensions_directory() -> Path:
    """Where torch keeps compiled extensions."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))


def extension_locks(directory: Path, *, compiling: bool) -> Iterator[Finding]:
    """A compilation that was killed leaves a lock, and every later start waits for it for ever without a word."""
    locks = sorted({*directory.glob("*/lock"), *directory.glob("*/*/lock")})
    for lock in locks:
        if compiling:
            yield Finding("note", f"{lock}: an extension is being compiled now")
        else:
            yield Finding("fail", f"{lock}: left by a killed compilation, runs would wait for it for ever: remove it")
    if not locks:
        yield Finding("ok", f"no stale lock in {directory}")


def loopback() -> Finding:
    """Can processes of this machine reach each other?"""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        return Finding("fail", f"the loopback network does not work: {error.strerror}")
    return Finding("ok", "loopback network")


def all_reduce() -> Finding:
    """Two processes, a file store and gloo."""
    with tempfile.TemporaryDirectory(prefix="harness-doctor-") as directory:
        command = [sys.executable, "-m", "harness.engine.all_reduce_check", str(Path(directory) / "store")]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), "2"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for rank in range(2)
        ]
        try:
            errors = [rank.communicate(timeout=_ALL_REDUCE_LIMIT_S)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            return Finding("fail", f"a 2-process all-reduce did not end within {_ALL_REDUCE_LIMIT_S} s")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    for rank, error in zip(ranks, errors, strict=True):
        if rank.returncode != 0:
            return Finding("fail", f"a 2-process all-reduce failed: {_last_line(error)}")
    return Finding("ok", "2-process all-reduce (gloo, file store)")


def built_ops(names: list[str]) -> Iterator[Finding]:
    """Compile each op in a process of its own."""
    for name in names:
        print(f"...   compiling {name}; this takes minutes the first time", flush=True)
        command = [sys.executable, "-m", "harness.engine.build_ops", name]
        environment = {**os.environ, "PATH": _path_with_environment()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            yield Finding("ok", f"{name} is compiled")
        else:
            yield Finding("fail", f"{name} cannot be compiled: {_last_line(done.stderr)}")


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")


def _is_compiling() -> bool:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue
    return not names.isdisjoint(_COMPILERS)


def _path_with_environment() -> str:
    """PATH with the scripts of our own environment first: ninja is installed there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
