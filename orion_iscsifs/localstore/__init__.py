"""The append-only log on a local disk that the cache builds on (docs/log-format.md)."""
