"""All calls to the operator's own backend: webhooks, the `before_message` hook, the login callback."""
