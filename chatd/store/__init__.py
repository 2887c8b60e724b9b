"""The database: schema, the one writer, reads, the outbox. The only room that knows SQL."""
