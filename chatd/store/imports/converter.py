"""Turns the rows of the original table into messages of chatd, or says what is wrong with them. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import tzinfo
from functools import lru_cache, partial
from typing import Any

import msgspec

from chatd.core.errors import BadRequest, TooLarge
from chatd.core.limits import CLIENT_ID_CHARS, MAX_ID
from chatd.core.model import DEFAULT_TYPE
from chatd.core.protocol import check_content, check_meta
from chatd.store.imports.moments import moment
from chatd.store.imports.records import Problem, Record, Row
from chatd.store.write.commands import Create

TYPE_CHARS = 32
DIGITS = 20  # of the longest 64-bit integer; Python would take minutes for a million digits
# NULL in a file: CSV has no word of its own for it. An empty `content` is an empty text.
_NULL = frozenset({"", "\\N", "NULL"})
_NULL_CONTENT = "\\N"

MISSING = "is missing"
NO_INTEGER = "is not an integer, and chatd's ids are integers"
OUT_OF_RANGE = f"is not an id from 1 to {MAX_ID}"
NO_JSON = "is not JSON"
HAS_NUL = "holds a NUL character"
LATER_REPLY = "is not an earlier message"


class Converter:
    def __init__(self, zone: tzinfo, content_chars: int, meta_bytes: int, encoding: str = "UTF-8") -> None:
        """`zone`: of dates without an offset. The limits are those of the configuration."""
        self._content_chars, self._meta_bytes = content_chars, meta_bytes
        self._no_text = f"holds bytes that are not {encoding}"
        # Neighbouring rows mostly have dates in common, and `updated_at` mostly is `created_at`.
        self._parse = lru_cache(maxsize=4096)(partial(moment, zone=zone))

    def row(self, record: Record) -> Row:
        """Raises Problem."""
        if record.problem is not None:
            raise record.problem
        try:
            return self._row(record, record.values)
        except KeyError as error:
            raise Problem(str(error.args[0]), MISSING) from None

    def _row(self, record: Record, values: Mapping[str, Any]) -> Row:
        id = _id("id", values["id"])
        created_at = self._moment("created_at", values["created_at"])
        if created_at is None:
            raise Problem("created_at", MISSING)
        reply_to = _optional(values.get("reply_to"))
        if reply_to is not None and (reply_to := _id("reply_to", reply_to)) >= id:
            raise Problem("reply_to", LATER_REPLY, reply_to)
        asked = Create(
            conversation_id=_id("chat_conversation_id", values["chat_conversation_id"]),
            user_id=_id("user_id", values["user_id"]),
            content=self._content(values["content"]),
            type=self._label("type", values["type"], TYPE_CHARS) or DEFAULT_TYPE,
            meta=self._meta(values["meta"]),
            reply_to=reply_to,
        )
        deleted_at = self._moment("deleted_at", values.get("deleted_at"))
        kept = deleted_at is None  # Laravel's soft deletes keep the content; chatd never does
        return Row(
            id=id,
            conversation_id=asked.conversation_id,
            user_id=asked.user_id,
            type=asked.type,
            content=asked.content if kept else None,
            meta=msgspec.json.encode(asked.meta).decode() if kept and asked.meta is not None else None,
            created_at=created_at,
            updated_at=self._moment("updated_at", values["updated_at"]) or created_at,
            client_id=self._label("client_id", values.get("client_id"), CLIENT_ID_CHARS),
            request_hash=asked.request_hash(),
            reply_to=reply_to,
            edited_at=self._moment("edited_at", values.get("edited_at")),
            deleted_at=deleted_at,
            record=record,
        )

    def _moment(self, column: str, value: Any) -> str | None:
        value = _optional(value)
        if value is None:
            return None
        try:
            return self._parse(str(value))
        except ValueError as error:
            raise Problem(column, str(error), value) from None

    def _content(self, value: Any) -> str:
        if value is None or value == _NULL_CONTENT:
            return ""
        text = self._text("content", value)
        try:
            check_content(text, self._content_chars)
        except TooLarge:
            kind = f"has more than the {self._content_chars:,} characters that limits.content_chars allows"
            raise Problem("content", kind) from None
        except BadRequest:
            raise Problem("content", HAS_NUL) from None
        return text

    def _label(self, column: str, value: Any, most: int) -> str | None:
        if (value := _optional(value)) is None:
            return None
        text = self._text(column, value)
        if len(text) > most:
            raise Problem(column, f"has more than {most} characters", text)
        if "\0" in text:
            raise Problem(column, HAS_NUL)
        return text

    def _meta(self, value: Any) -> Any:
        """A text is JSON, as a database holds it. A file of JSON lines may hold the value itself."""
        if (value := _optional(value)) is None:
            return None
        try:
            found = msgspec.json.decode(value) if isinstance(value, str) else value
            check_meta(found, self._meta_bytes)
        except TooLarge:
            kind = f"has more than the {self._meta_bytes:,} bytes of JSON that limits.meta_bytes allows"
            raise Problem("meta", kind) from None
        except BadRequest:
            raise Problem("meta", "is nested too deeply") from None
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise Problem("meta", NO_JSON) from None
        return found

    def _text(self, column: str, value: Any) -> str:
        if not isinstance(value, str):
            raise Problem(column, "is not a text", value)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # bytes that could not be decoded, or half of a pair of UTF-16
                raise Problem(column, self._no_text) from None
        return value


def _optional(value: Any) -> Any:
    return None if isinstance(value, str) and value in _NULL else value


def _id(column: str, value: Any) -> int:
    if (value := _optional(value)) is None:
        raise Problem(column, MISSING)
    number = value if type(value) is int else _integer(column, value)
    if not 1 <= number <= MAX_ID:
        raise Problem(column, OUT_OF_RANGE, value)
    return number


def _integer(column: str, value: Any) -> int:
    try:
        if isinstance(value, str) and len(value) <= DIGITS and "_" not in value:
            return int(value)
    except ValueError:
        pass
    raise Problem(column, NO_INTEGER, value)
