"""Everything that measures. Not installed, and nothing else imports it."""
