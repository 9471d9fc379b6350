"""How the C library gives memory to large tensors."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3) and what glibc makes of them by itself.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
USUAL_TRIM_BYTES, USUAL_MMAP_MAX = 64 << 20, 65536


@contextmanager
def kept_heap() -> Iterator[None]:
    """Within, freed memory is kept for the next tensor, whatever its size; what is left over is given back at the end.

    glibc takes more than 32 MiB from the kernel each time, which clears every page of it: with a vocabulary of 250,000
    that is as much work as the products. Other C libraries are left alone.
    """
    library = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, USUAL_MMAP_MAX)
        library.mallopt(M_TRIM_THRESHOLD, USUAL_TRIM_BYTES)
        library.malloc_trim(0)
