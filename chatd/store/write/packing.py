"""Keeps waiting commands small, and measures the memory that they take.

`meta` waits as JSON, because 8 kB of it may be 2,700 empty lists, which take 170 kB of memory when decoded.
"""

from __future__ import annotations

from sys import getsizeof
from typing import TypeVar

import msgspec
from msgspec import Raw

from chatd.store.write.commands import AnyCommand, Create, Edit

EACH = 700  # bytes of a command without its fields, including the objects that wait for its outcome

C = TypeVar("C", bound=AnyCommand)


def pack(command: C) -> C:
    if isinstance(command, Create | Edit) and command.meta and isinstance(command.meta, dict | list):
        return msgspec.structs.replace(command, meta=Raw(msgspec.json.encode(command.meta)))
    return command


def unpack(command: AnyCommand) -> AnyCommand:
    if isinstance(command, Create | Edit) and isinstance(command.meta, Raw):
        return msgspec.structs.replace(command, meta=msgspec.json.decode(command.meta))
    return command


def size(command: AnyCommand) -> int:
    """Bytes of memory that a packed command takes."""
    total = EACH
    for name in command.__struct_fields__:
        value = getattr(command, name)
        if type(value) is str or type(value) is bytes:
            total += getsizeof(value)
        elif type(value) is Raw:
            total += len(memoryview(value))
    return total
