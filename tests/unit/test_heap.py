"""Memory of large tensors: kept while it is wanted, given back afterwards."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import psutil
import pytest
import torch

from harness.io.heap import kept_heap

SIZE = 40 << 20  # bytes: more than glibc ever keeps by itself


def use() -> None:
    torch.ones(SIZE, dtype=torch.uint8)


def page_faults(work: Callable[[], None]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_of_large_tensors_is_used_again_and_then_given_back() -> None:
    pages = SIZE // resource.getpagesize()
    use()
    assert page_faults(use) > pages / 2
    with kept_heap():
        for _ in range(50):  # until the heap has a place for every alignment
            use()
        assert page_faults(use) < pages / 10
        kept = psutil.Process().memory_info().rss
    assert psutil.Process().memory_info().rss < kept - SIZE / 2
    assert page_faults(use) > pages / 2
