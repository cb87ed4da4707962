"""The compressed read cache on a local disk, as a device (docs/tier-format.md)."""
