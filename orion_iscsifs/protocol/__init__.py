"""RFC 7143 without I/O: PDUs, framing, negotiation, sequence numbers, data transfer.

Nothing here knows a socket, a clock or randomness; initiator and target share all of it.
"""
