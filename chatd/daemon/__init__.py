"""The process: what runs in it, in which order it starts and ends, and what it owes its manager."""
