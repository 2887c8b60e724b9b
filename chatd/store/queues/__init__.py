"""Rows that wait for somebody to act on them: the bus's outbox, webhooks, presence."""
