"""Posts the messages that other services add to the Redis stream `chat.ingest`."""
