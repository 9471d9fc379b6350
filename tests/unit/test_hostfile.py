"""Hostfiles and filters, compared with DeepSpeed's own reading of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.errors import ConfigError, DataError
from harness.launch.hostfile import chosen_nodes, read_hostfile
from harness.launch.nodes import Node, first_ranks

HOSTS = """\
# two big ones
node1 slots=4

node2   slots=4   # a remark
small slots=1
"""


@pytest.fixture
def slots(tmp_path: Path) -> dict[str, int]:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return read_hostfile(path)


def test_reads_what_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    assert list(read_hostfile(path).items()) == list(fetch_hostfile(str(path)).items())


@pytest.mark.parametrize("text", ["node1", "node1@node2:0,2", "node2:3@small", "node2:1"])
@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_filters_choose_what_deepspeed_chooses(slots: dict[str, int], kind: str, text: str) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    filters = {"include": "", "exclude": ""} | {kind: text}
    expected = parse_inclusion_exclusion(slots, filters["include"], filters["exclude"])
    nodes = chosen_nodes(slots, include=filters["include"] or None, exclude=filters["exclude"] or None)
    assert [(node.name, list(node.devices or range(node.num_ranks))) for node in nodes] == [
        (host, sorted(numbers)) for host, numbers in expected.items()
    ]


def test_a_node_used_in_part_says_which_devices(slots: dict[str, int]) -> None:
    nodes = chosen_nodes(slots, include="node1@node2:0,2", exclude="node1:1")
    assert nodes == [Node("node1", 3, (0, 2, 3)), Node("node2", 2, (0, 2))]
    assert first_ranks(nodes) == [0, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node1", ":1: not a host: 'node1'"),
        ("node1 slots=2\nnode2 slots=two\n", ":2: not a host"),
        ("node1 slots=0\n", ":1: not a host"),
        ("node1 slots=2\n\nnode1 slots=2\n", ":3: node1 stands twice"),
        ("-oProxyCommand=x slots=2\n", ":1: not the name of a host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("node9", "not in the hostfile"), ("node1:x", "not a host with slots"), ("node2:4", "has no slot 4")],
)
def test_a_wrong_filter_is_refused(slots: dict[str, int], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_nodes(slots, include=text, exclude=None)
    with pytest.raises(ConfigError, match=message):
        chosen_nodes(slots, include=None, exclude=text)


def test_excluding_every_host_is_refused(slots: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="no host is left"):
        chosen_nodes(slots, include=None, exclude="node1@node2@small")
