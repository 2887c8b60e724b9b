"""Maintenance of the database: retention, erasure, copies, checks."""
