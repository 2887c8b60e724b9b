"""Tells clients which users are online in a room."""
