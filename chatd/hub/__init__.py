"""WebSocket: connections, their sessions, the rooms they are in, and the fanout that serves the rooms."""
