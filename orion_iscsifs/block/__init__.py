"""The contract that every storage layer keeps, and the helpers that all of them share."""
