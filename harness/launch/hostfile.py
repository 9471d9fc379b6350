"""DeepSpeed's hostfile and its include and exclude filters (deepspeed.launcher.runner: fetch_hostfile,
parse_resource_filter)."""

from __future__ import annotations

import re
from pathlib import Path

from harness.errors import ConfigError, DataError
from harness.launch.nodes import Node

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host, in the order of the file. DataError names the first line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the hostfile: {error}", where=str(path)) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match, where = _LINE.fullmatch(line.strip()), f"{path}:{number}"
        if match is None or int(match[2]) == 0:
            raise DataError(f"not a host: {line.strip()!r}", where=where, hint="a line is `name slots=8`")
        if match[1].startswith("-"):  # ssh would take it for an option
            raise DataError(f"not the name of a host: {match[1]!r}", where=where)
        if match[1] in slots:
            raise DataError(f"{match[1]} stands twice", where=where, hint="give each host one line with all its slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise DataError("the hostfile names no host", where=str(path), hint="a line is `name slots=8`")
    return slots


def chosen_nodes(slots: dict[str, int], *, include: str | None, exclude: str | None) -> list[Node]:
    """The nodes that the filters leave, such as `node1@node2:0,2`: all of node1, slots 0 and 2 of node2."""
    chosen = {host: set(range(count)) for host, count in slots.items()}
    if include is not None:
        wanted = _parse_filter(include, slots, "launch.include")
        chosen = {host: wanted.get(host, set()) for host in slots}
    if exclude is not None:
        unwanted = _parse_filter(exclude, slots, "launch.exclude")
        chosen = {host: numbers - unwanted.get(host, set()) for host, numbers in chosen.items()}
    nodes = [
        Node(host, len(numbers), None if len(numbers) == slots[host] else tuple(sorted(numbers)))
        for host, numbers in chosen.items()
        if numbers
    ]
    if not nodes:
        raise ConfigError("no host is left", where="launch.include, launch.exclude")
    return nodes


def _parse_filter(text: str, slots: dict[str, int], key: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, _, numbers = part.strip().partition(":")
        if host not in slots:
            raise ConfigError(f"{host!r} is not in the hostfile", where=key, hint=f"hosts are: {', '.join(slots)}")
        if numbers and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ConfigError(f"{part!r} is not a host with slots", where=key, hint="write it as node2:0,2")
        wanted = {int(number) for number in numbers.split(",")} if numbers else set(range(slots[host]))
        if missing := wanted - set(range(slots[host])):
            raise ConfigError(f"{host} has no slot {min(missing)}, only {slots[host]} slots", where=key)
        found[host] = found.get(host, set()) | wanted
    return found
