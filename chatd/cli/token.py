"""`token`: prints a user's token, for tests by hand."""

from __future__ import annotations

from pathlib import Path

import click

from chatd import config
from chatd.auth.tokens import Tokens
from chatd.cli.group import main, with_config
from chatd.core.errors import BadRequest, Forbidden, OperatorError
from chatd.core.limits import MAX_ID
from chatd.observe import logs
from chatd.store import database


@main.command()
@click.argument("user_id", type=click.IntRange(1, MAX_ID))
@click.option("--ttl", type=click.IntRange(1), help="Seconds for which it is valid, instead of auth.token_ttl.")
@click.option(
    "--room",
    "rooms",
    type=click.IntRange(1, MAX_ID),
    multiple=True,
    help="A room that the token opens. You may repeat this option.",
)
@with_config
def token(path: Path | None, user_id: int, ttl: int | None, rooms: tuple[int, ...]) -> None:
    """Print a token for a user, for tests by hand."""
    settings = config.load(path, require_token=False)
    logs.configure("warning", settings.logs.format)
    tokens = issuer(settings)
    try:
        click.echo(tokens.issue(user_id, ttl or settings.auth.token_ttl, rooms or None))
    except BadRequest as error:
        raise OperatorError(str(error)) from None


def issuer(settings: config.Config) -> Tokens:
    """Return an issuer of tokens that the daemon accepts. Raises OperatorError if the configuration lets the
    daemon accept none of its own tokens.
    """
    secret = settings.auth.secret
    if not secret:
        secret = database.token_secret(settings.database)
    tokens = Tokens(secret, settings.auth, frame_bytes=settings.limits.frame_bytes)
    try:
        tokens.issue(1, 1)
    except Forbidden as error:
        raise OperatorError(str(error)) from None
    return tokens
