"""Tools for who works on chatd. Nothing here is installed with it."""
