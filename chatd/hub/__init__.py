"""The WebSocket side: connections, their sessions, the rooms they join, and the fanout that serves them."""
