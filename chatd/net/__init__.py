"""Sockets that both servers share: how many connections may come, and which of them make room for others."""
