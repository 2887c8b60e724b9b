"""The rooms of this node, and how each change reaches everybody who listens."""
