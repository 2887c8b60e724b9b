"""Every call to the team's own backend: webhooks, the `before_message` hook, the login callback."""
