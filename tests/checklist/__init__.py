"""The items of docs/conformance.md's "The 56 checks" that no test of a single part shows."""
