"""How the C library gives memory to large tensors."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3), and what glibc makes of them by itself in a process with large tensors.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
USUALLY = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}


@contextmanager
def kept_heap() -> Iterator[None]:
    """Within, freed memory is kept for the next tensor, whatever its size; what is left over is given back at the end.

    glibc takes more than 32 MiB from the kernel each time, which clears every page of it: with a vocabulary of 250,000
    that is as much work as the products. Other C libraries are left alone.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in USUALLY.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
