"""The database: schema, the one writer, reads, queues. No other package uses SQL."""
