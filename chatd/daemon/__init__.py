"""The process: which tasks run in it, in which order they start and end, and what it reports to its manager."""
