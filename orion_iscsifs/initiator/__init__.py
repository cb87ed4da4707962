"""The initiator: one session to one target, and each of its LUNs as a BlockDevice."""
