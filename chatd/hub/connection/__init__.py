"""One WebSocket connection: its handshake, what is sent over it, and whether its peer is alive."""
