"""Everything that measures. Not installed, and nothing else imports it."""

import empssl_support  # noqa: F401  (before torch: it says how torch's idle threads are to wait)
