"""Alembic runs this file. It uses the connection and the transaction of `upgrade`."""

from alembic import context

from chatd.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
