"""The writer: takes commands, and commits each group of them in one transaction."""
