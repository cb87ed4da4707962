"""Text Requests in full feature phase: SendTargets, and keys that may change there (RFC 7143 §6.4).

What the keys mean is `protocol.text_negotiation`'s business. Here an exchange meets its connection:
what is declared counts for this connection only, from the end of the exchange on.
"""

from collections.abc import Sequence

from orion_iscsifs.errors import ProtocolViolation
from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import TextRequest, TextResponse
from orion_iscsifs.protocol.text import Pair
from orion_iscsifs.protocol.text_negotiation import Directory, TextResponder
from orion_iscsifs.target.connection import Connection

__all__ = ["Directory", "Texts"]


class Texts:
    """The text exchanges of one connection, one at a time (RFC 7143 §11.10)."""

    def __init__(
        self, connection: Connection, directory: Directory, parameters: Parameters
    ) -> None:
        self._connection = connection
        self._responder = TextResponder(directory, parameters)

    @property
    def parameters(self) -> Parameters:
        """The connection's: they follow each exchange that ends well."""
        return self._responder.parameters

    def propose(self, pairs: Sequence[Pair]) -> None:
        """What to declare in the next exchange; Async Message 4 asks the initiator for one."""
        self._responder.propose(pairs)

    def receive(self, request: TextRequest) -> TextResponse | None:
        """The response; None: the negotiation is void, the answer is a Reject (§6.4)."""
        try:
            response = self._responder.receive(request)
        except ProtocolViolation:
            return None
        self._connection.segment_bytes_max = self.parameters.max_recv_data_segment_length
        return response
