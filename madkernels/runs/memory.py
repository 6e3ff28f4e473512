"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in malloc.h
SET_BY_HAND = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Asks glibc to keep what this process frees, for its next tensors.

    By default the memory of every large tensor goes back to the system when it is freed, and comes as new pages of zeros the
    next time, which takes a tenth to a half of a training step on a CPU. Elsewhere than on glibc, and where the environment
    says how memory is kept (MALLOC_TRIM_THRESHOLD_ and the like), nothing changes.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in SET_BY_HAND):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)


def give_back_memory() -> None:
    """Gives what was kept back to the system, where something else is to come."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
