"""What the probes of all nodes have found, judged: a sentence for what is right, and one for each thing to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from harness.config.launch_rules import num_gpus, ranks_per_node
from harness.config.schema import RunConfig
from harness.launch.preflight import Finding
from harness.launch.probe import Facts
from harness.plan.advice import shown_bytes

_MOST_CLOCK_SKEW_S = 5.0
_FEWEST_OPEN_FILES = 1024  # a socket for each other rank, shards, libraries


def judge(facts: Mapping[int, Facts], config: RunConfig, *, host_bytes: int) -> Iterator[Finding]:
    """Findings on nodes that have all reported; `host_bytes`: what the plan holds in the memory of each."""
    nodes, slurm = list(facts.values()), config.slurm
    yield from _same_software(nodes)
    yield from _directories(facts, config)
    yield from _files(nodes)
    yield from _hardware(nodes, ranks_per_node(config), num_gpus(slurm.gpus_per_node) if slurm else 0, host_bytes)
    yield from _network(nodes, config.launch.interface)


def _same_software(nodes: list[Facts]) -> Iterator[Finding]:
    first = nodes[0]
    versions = {f"Python {node['python']}, harness {node['harness']}": node["host"] for node in reversed(nodes)}
    packages = {str(sorted(node["packages"].items())): node["host"] for node in reversed(nodes)}
    if len(versions) > 1:
        differing = "; ".join(f"{host} has {version}" for version, host in versions.items())
        change = "make the same environment visible on all nodes, in a directory that they share"
        yield Finding(f"the nodes do not run the same software: {differing}", change)
    elif len(packages) > 1:
        differing = "; ".join(f"{host} has {package}" for package, host in packages.items())
        yield Finding(
            f"the nodes have other packages: {differing}", "install the same versions (constraints.txt) on all"
        )
    else:
        yield Finding(f"Python {first['python']}, harness {first['harness']} and the same packages on all nodes")
    missing = [name for name, version in first["packages"].items() if version is None]
    if missing:
        change = f"activate the environment that has them in slurm.setup; {first['executable']} was used"
        yield Finding(f"{', '.join(missing)} are not installed on {first['host']}", change)


def _directories(facts: Mapping[int, Facts], config: RunConfig) -> Iterator[Finding]:
    is_well = True
    for node in facts.values():
        if problem := node["run_dir"]["problem"]:
            change = "give the user that the job runs as the right to write there, or set another output_dir"
            yield Finding(f"output_dir cannot be written on {node['host']}: {problem}", change)
        absent = ", ".join(other["host"] for number, other in facts.items() if number not in node["seen"])
        if absent:
            change = "set output_dir to a directory of a file system that all nodes share"
            yield Finding(f"{node['host']} does not see what {absent} writes in the run directory", change)
        is_well &= not (problem or absent)
        local = node["node_local_dir"]
        if local is not None and local["problem"]:
            what = f"launch.node_local_dir {config.launch.node_local_dir} cannot be used on {node['host']}"
            change = "name a directory that can be made and written on every node, or make it in slurm.setup"
            yield Finding(f"{what}: {local['problem']}", change)
    if is_well:
        yield Finding("the run directory is written and seen by all nodes")


def _files(nodes: list[Facts]) -> Iterator[Finding]:
    unreadable = [(node["host"], path, why) for node in nodes for path, why in node["unreadable"].items()]
    for host, path, why in unreadable:
        change = "put it on a file system that all nodes share, or copy it to the same path on every node"
        yield Finding(f"{path} cannot be read on {host}: {why}", change)
    if not unreadable:
        yield Finding("data and model files can be read on all nodes")


def _hardware(nodes: list[Facts], ranks: int, gpus_wanted: int, host_bytes: int) -> Iterator[Finding]:
    for node in nodes:
        if gpus_wanted and node["gpus"] != gpus_wanted:
            what = f"{node['host']} gives the job {node['gpus']} GPUs, and slurm.gpus_per_node asks for {gpus_wanted}"
            change = (
                "ask for GPUs by slurm.gpus_per_node alone: take what contradicts it out of slurm.options and setup"
            )
            yield Finding(what, change)
        if node["memory_bytes"] < host_bytes:
            has, needs = shown_bytes(node["memory_bytes"]), shown_bytes(host_bytes)
            change = f"raise slurm.memory above {needs}, or choose a deepspeed.preset with less offload (harness plan)"
            yield Finding(f"{node['host']} gives the job {has} of memory, and offloading alone needs {needs}", change)
        if node["open_files"] < _FEWEST_OPEN_FILES:
            what = f"{node['host']} allows {node['open_files']} open files per process"
            yield Finding(what, f"raise it by `ulimit -n {_FEWEST_OPEN_FILES}` in slurm.setup")
        if node["cores"] < ranks:
            what = f"{node['host']} gives the job {node['cores']} cores for {ranks} ranks"
            yield Finding(what, "raise slurm.cpus_per_node")
    gpus, cores = nodes[0]["gpus"], nodes[0]["cores"]
    memory = shown_bytes(nodes[0]["memory_bytes"])
    yield Finding(f"{nodes[0]['host']}: {gpus} GPUs, {cores} cores, {memory} of memory")


def _network(nodes: list[Facts], interface: str | None) -> Iterator[Finding]:
    lacking = [node for node in nodes if interface is not None and interface not in node["addresses"]]
    for node in lacking:
        known = ", ".join(sorted(set(node["addresses"]) - {"lo"}))
        what = f"launch.interface {interface} does not exist on {node['host']}, or has no IPv4 address"
        yield Finding(what, f"set it to one of {known}, or remove it")
    cut: dict[tuple[str, str, str], list[str]] = {}
    for node in nodes:
        for target, port, why in node["unreachable"]:
            cut.setdefault((node["host"], target, why), []).append(str(port))
    for (host, target, why), ports in cut.items():
        change = "open TCP between the nodes (the ranks use any free port), or set launch.interface to another network"
        yield Finding(f"{host} cannot reach {target} on port {' and '.join(ports)}: {why}", change)
    for node in nodes:
        if abs(node["clock_offset_s"] or 0.0) > _MOST_CLOCK_SKEW_S:
            what = f"the clock of {node['host']} differs from {nodes[0]['host']}'s by {node['clock_offset_s']:+.1f} s"
            yield Finding(what, "have the node synchronised (NTP): times in logs and records cannot be compared")
    if not cut and not lacking:
        yield Finding("every node reaches every node")
