"""Tells the C allocator to keep what it has freed, which large CPU temporaries need.

Knows nothing about JAX. glibc gives large blocks back to the kernel as soon as they are free; a
train step on CPU then spends its time faulting the same pages in again (measured on two virtual
cores: an elementwise pass over 33 MB takes 13 ms with the default, 2 ms with this).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Sets glibc's allocator, for this process, to reuse large blocks; call it before any work.

    Returns:
        Whether it could: False outside Linux with glibc, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
