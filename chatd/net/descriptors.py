"""How many files this process may open, and how many of them may be connections.

A daemon whose clients hold every descriptor could neither serve its backend nor reach its database.
"""

from __future__ import annotations

import resource

RESERVED = 256  # descriptors that are left to the API, the database and Redis, or
RESERVED_SHARE = 4  # a quarter of them, where there are few
RAISED_MOST = 1_048_576  # where the hard limit is none


def raise_descriptor_limit() -> int:
    """As many open files as the system allows this process; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = RAISED_MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def client_slots(descriptors: int) -> int:
    """How many of so many open files may be connections of clients."""
    return descriptors - min(RESERVED, descriptors // RESERVED_SHARE)


def unknown_slots(descriptors: int) -> int:
    """How many of them may be connections to the API that have not shown its token."""
    return max(1, min(RESERVED, descriptors // RESERVED_SHARE) // 2)
