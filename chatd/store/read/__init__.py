"""What is read from the database, and how many reads share one query."""
