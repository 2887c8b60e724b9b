"""One client's session: its login, its requests and their answers."""
