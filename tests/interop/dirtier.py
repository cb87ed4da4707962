"""A program that writes more than memory holds, and one that reads it back.

`dirtier.py write|check FOLDER FILES BLOCKS`: FILES files of BLOCKS MiB each. Imports next to
nothing: it runs where memory is short, and by its path.
"""

import os
import random
import sys
from pathlib import Path

BLOCK_BYTES = 1 << 20


def block(file: int, number: int) -> bytes:
    return random.Random(file << 32 | number).randbytes(BLOCK_BYTES)


def write(folder: Path, files: int, blocks: int) -> None:
    """All is dirty before the first fsync, as far as memory lets it be."""
    opened = [(folder / f"file{number}").open("wb", buffering=0) for number in range(files)]
    for number in range(blocks):
        for index, file in enumerate(opened):
            assert file.write(block(index, number)) == BLOCK_BYTES
    for file in opened:
        os.fsync(file.fileno())
        file.close()


def check(folder: Path, files: int, blocks: int) -> None:
    for index in range(files):
        with (folder / f"file{index}").open("rb", buffering=0) as file:
            for number in range(blocks):
                assert file.read(BLOCK_BYTES) == block(index, number), (index, number)
            assert file.read(1) == b""


if __name__ == "__main__":
    work = {"write": write, "check": check}[sys.argv[1]]
    work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
