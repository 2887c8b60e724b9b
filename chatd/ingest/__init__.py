"""The stream `chat.ingest`, from which messages of other services are posted."""
