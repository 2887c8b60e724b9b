"""Queues in the database: the bus's outbox, webhooks, presence."""
