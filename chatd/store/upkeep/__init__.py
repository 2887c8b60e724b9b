"""What keeps a database in order: retention, erasure, copies, checks."""
