"""Reply buffers for large reads, used again and again.

A fresh 1 MiB buffer costs 256 page faults, as much as copying it twice. A buffer may go back as
soon as the handler returns: pyfuse3 hands it to the kernel before anything else can run, since
there is no `await` between the handler's return and the reply.
"""

from typing import Final

BUFFER_BYTES: Final = 1 << 20
"""The longest request that libfuse negotiates."""
POOLED_BYTES_MIN: Final = 64 << 10
"""Below, a fresh buffer from malloc is cheaper than the pool."""
BUFFERS_KEPT_MAX: Final = 32


class ReplyBuffers:
    """A stack of idle 1 MiB buffers. Not for threads."""

    def __init__(self) -> None:
        self._idle: list[memoryview] = []

    def take(self) -> memoryview:
        """A buffer of BUFFER_BYTES with anything in it."""
        return self._idle.pop() if self._idle else memoryview(bytearray(BUFFER_BYTES))

    def give_back(self, buffer: memoryview) -> None:
        """`buffer` as it came from `take`; nobody may write to it any more."""
        if len(self._idle) < BUFFERS_KEPT_MAX:
            self._idle.append(buffer)
