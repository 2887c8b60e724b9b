"""Moves an existing chat into chatd: reads the rows of the original `chat_messages` table, and writes them."""
