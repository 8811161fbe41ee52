"""Give freed memory back to the operating system: malloc keeps what large models leave behind."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Call glibc's `malloc_trim`; do nothing where the C library has none.

    Blocks of up to 32 MB stay with the process when they are freed, scattered between ones that live: a gigabyte of
    mpnet's weights and tensors, which the next stage would add its own to.

    Source: glibc 2.36, malloc/malloc.c, DEFAULT_MMAP_THRESHOLD_MAX.
    """
    if not sys.platform.startswith("linux"):
        return
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
