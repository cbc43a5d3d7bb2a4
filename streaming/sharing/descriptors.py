"""How many descriptors this process may have: a shared copy takes one."""

from __future__ import annotations

import contextlib


def raise_descriptors(wanted: int) -> int:
    """Allow this process as many descriptors as are ``wanted``, if it may; returns how many it may have."""
    import resource  # Windows has no such module, and imports this file in tests.

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return most if soft == resource.RLIM_INFINITY else max(soft, 0)
