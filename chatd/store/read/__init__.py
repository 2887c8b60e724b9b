"""Reads from the database. Many requests of the same kind share one query."""
