"""The limit of open files of this process, and the part of it that connections may use.

If clients could use every file descriptor, the daemon could neither serve its backend nor reach its database.
"""

from __future__ import annotations

import resource

RESERVED = 256  # descriptors reserved for the API, the database and Redis
RESERVED_SHARE = 4  # reserve at most one in this many, if there are few descriptors
RAISED_MOST = 1_048_576  # the limit to set if the system has no hard limit


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files as far as the system allows. Returns the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = RAISED_MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def client_slots(descriptors: int) -> int:
    """The number of descriptors, out of `descriptors`, that connections of clients may use."""
    return descriptors - min(RESERVED, descriptors // RESERVED_SHARE)


def unknown_slots(descriptors: int) -> int:
    """The number of descriptors that connections to the API may use before they have shown its token."""
    return max(1, min(RESERVED, descriptors // RESERVED_SHARE) // 2)
