"""Who is online in a room."""
