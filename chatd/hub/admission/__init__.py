"""Decides which clients may connect and log in, and knows which users are connected."""
