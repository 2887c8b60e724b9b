"""The checks of `chatd doctor`, one function each, in the order in which they run.

machine   limits of the system, the clock, who can read the secrets
data      the database, its directory, Redis
backend   what it answers to a login
serving   the daemon: its ports, and a round trip through it
names     names in Redis that chatd does not take
public    the same from outside, through the proxy
"""

from __future__ import annotations

from chatd.ops.checks import backend, data, machine, names, public, serving
from chatd.ops.finding import Check

# These checks need no valid configuration.
ALWAYS: list[Check] = [machine.connection_queue, machine.clock]

ALL: list[Check] = [
    machine.exposure,
    machine.secrets,
    machine.public_keys,
    *ALWAYS,
    data.database,
    data.database_directory,
    data.redis,
    serving.api,
    serving.websocket,
    serving.open_files,
    serving.backend_calls,
    backend.login,
    names.redis_names,
    serving.round_trip,
    public.certificate,
    public.upgrade,
    public.internal_api,
    public.public_round_trip,
]
