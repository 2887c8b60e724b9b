"""What operators see of a running chatd: logs, metrics, and the samples that /status draws."""
