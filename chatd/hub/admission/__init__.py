"""Who may connect and log in, and who is connected."""
