"""Memory of large tensors: kept while it is wanted, given back afterwards."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

SIZE = 40 << 20  # bytes: more than glibc ever keeps by itself

# In a process of its own: what other tests left on the heap would decide the numbers.
PROGRAM = f"""
import json, psutil, torch
from harness.io.heap import kept_heap

def resident_after(uses):
    for _ in range(uses):
        torch.ones({SIZE}, dtype=torch.uint8)
    return psutil.Process().memory_info().rss

before = resident_after(1)
with kept_heap():
    once, often, still = resident_after(1), resident_after(50), resident_after(50)
print(json.dumps([before, once, often, still, resident_after(0)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_of_large_tensors_is_used_again_and_then_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    before, once, often, still, afterwards = json.loads(run.stdout)
    assert once > before + SIZE / 2
    assert still < often + SIZE / 2  # often: until the heap has a place for every alignment
    assert afterwards < before + SIZE / 2
