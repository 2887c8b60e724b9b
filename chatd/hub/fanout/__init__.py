"""The rooms of this node, and the fanout that delivers each change to their subscriptions."""
