"""The one error of this package's decoders, and how they read a field that may be missing."""

from orion_iscsifs.errors import DeviceError

Buffer = bytes | bytearray | memoryview


class MalformedData(DeviceError):
    """The peer's parameter data can't be what its command asks for."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what}: {problem}")


def field(data: Buffer, offset: int, length: int) -> int:
    """A big-endian number; bytes past the end of `data` count as zeroes."""
    piece = bytes(data[offset : offset + length])
    return int.from_bytes(piece.ljust(length, b"\0"), "big")
