"""The code behind the operator's commands: it checks a running daemon, posts to it, and follows a room."""
