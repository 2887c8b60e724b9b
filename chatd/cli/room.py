"""`tail` and `send`: an operator follows a room, or posts to it, from a terminal."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from chatd import config
from chatd.cli.group import main, with_config
from chatd.core.errors import OperatorError, innermost
from chatd.core.limits import MAX_ID, OPERATOR
from chatd.observe import logs
from chatd.ops.api import ApiClient, Unreachable, reached_at

ID = click.IntRange(1, MAX_ID)


@main.command()
@click.argument("room", type=ID)
@click.argument("text")
@click.option("--user", "user_id", type=ID, required=True, help="The user in whose name you post.")
@click.option("--url", default="", help="The URL of the HTTP API, if it is not on api.bind.")
@with_config
def send(path: Path | None, room: int, text: str, user_id: int, url: str) -> None:
    """Post a message to a room, as a backend does, and print its id and seq.

    If TEXT is -, the message is read from standard input. chatd creates the room if it does not exist, and
    makes the user a member. Exit codes: 0 posted; 75 not posted, try again later; 1 refused.
    """
    settings = config.load(path)
    content = sys.stdin.read().rstrip("\n") if text == "-" else text
    body = {"conversation_id": room, "sender_id": user_id, "content": content}
    answer = ApiClient(settings, url).ask("POST", "/api/ws/messages", body)
    said = answer.json
    if answer.status == 200 and "seq" in said:
        click.echo(f"id {said['id']} seq {said['seq']}")
        return
    sentence = said.get("message", "another program answers there, not chatd")
    if answer.status == 401:
        sentence = "api.internal_token here is not the daemon's. Use the daemon's configuration"
    elif said.get("errors"):
        sentence = " ".join(part for parts in said["errors"].values() for part in parts)
    kind: type[OperatorError] = Unreachable if answer.status in (429, 502, 503, 504) else OperatorError
    raise kind(f"Not posted: {sentence.rstrip('.')} ({answer.status}).")


@main.command()
@click.argument("room", type=ID)
@click.option("--user", "user_id", type=ID, help="Read as this member, who appears online meanwhile.")
@click.option(
    "--since", type=click.IntRange(0, 10_000), default=0, help="Print this number of earlier messages first."
)
@click.option("--all", "everything", is_flag=True, help="Show typing and receipts, too.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
@click.option("--url", default="", help="The URL of the WebSocket, if it is not on hub.bind: wss://host/ws.")
@with_config
def tail(path: Path | None, room: int, user_id: int | None, url: str, **how: Any) -> None:
    """Print the messages and events of a room until Ctrl-C, also over restarts of the daemon.

    Without --user you read as the reserved user 9007199254740991, with a token for this room only. That user
    is not a real account and does not become a member, but clients that ask who is online see it. With --user
    you see what that user may see; the exit code is 1 if the user may not enter. No message is marked as read
    or delivered.
    """
    settings = config.load(path, require_token=False)
    logs.configure("error", settings.logs.format)
    _follow(settings, url or f"ws://{reached_at(settings.hub.bind)}/ws", room, user_id, **how)


def _follow(
    settings: config.Config,
    url: str,
    room: int,
    user_id: int | None,
    *,
    since: int,
    everything: bool,
    as_json: bool,
) -> None:
    import trio  # imported here, because these imports are slow and `send` does not need them

    from chatd.cli.token import issuer
    from chatd.ops import transcript
    from chatd.ops.client import Connection, Event, history
    from chatd.ops.follower import Follower, Refused

    tokens = issuer(settings)
    emphasize = partial(click.style, bold=True) if sys.stdout.isatty() else str

    def log_in() -> str:
        rooms = None if user_id else [room]
        return tokens.issue(user_id or OPERATOR, settings.auth.token_ttl, rooms)

    def show(event: Event) -> None:
        if everything or event["event"] not in transcript.QUIET:
            click.echo(transcript.as_json(event) if as_json else transcript.as_line(event, emphasize))

    newest = 0  # the id of the newest earlier message: one that was posted during the read also arrives live

    async def earlier(connection: Connection) -> None:
        nonlocal newest
        for message in await history(connection, room, since):
            show({"event": "message"} | message)
            newest = message["id"]

    def live(event: Event) -> None:
        if event["event"] != "message" or event.get("id", newest + 1) > newest:
            show(event)

    def notice(sentence: str) -> None:
        click.echo(click.style(sentence, dim=True), err=True)

    follower = Follower(url, room, log_in=log_in, tell=live, notice=notice)
    try:
        trio.run(follower.run, earlier)
    except* KeyboardInterrupt:
        pass
    except* Refused as group:
        why = innermost(group)
        raise OperatorError(f"Room {room} cannot be followed: {str(why).rstrip('.')}.") from None
    except* BrokenPipeError:
        sys.stderr.close()  # the reader of the pipe has ended: avoid Python's own message about it
