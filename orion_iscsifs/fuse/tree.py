"""Which files the mount has: names and inode numbers. Pure.

Device files come and go with their LUNs. An inode number is never used again: whoever still has the
old file open must not reach a new one. A worker that takes a mount over knows the numbers that the
kernel has: a path that had one keeps it.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from orion_iscsifs.errors import MountError

ROOT_INODE: Final = 1
CONTROL_FOLDER: Final = ".orion"
_NAME_BYTES_MAX: Final = 255


class Kind(enum.Enum):
    FOLDER = enum.auto()
    DEVICE = enum.auto()
    """One LUN."""
    VIRTUAL = enum.auto()
    """Text made when it is opened (`.orion/`)."""


@dataclass(frozen=True, slots=True)
class Node:
    """`path` is relative to the mount point, the root's is ''."""

    inode: int
    parent: int
    name: bytes
    path: str
    kind: Kind
    is_control: bool = False
    """`.orion` and what is in it."""


class Tree:
    """All nodes, by inode and by name."""

    def __init__(
        self,
        devices: Iterable[str],
        virtual: Sequence[str] = (),
        *,
        numbers: Mapping[str, int] | None = None,
        next_inode: int = ROOT_INODE + 1,
    ) -> None:
        """`devices` are relative paths, `virtual` names inside `.orion` (none: no `.orion`).

        `numbers`: the inodes that paths have had before, all of them below `next_inode`.
        """
        root = Node(ROOT_INODE, ROOT_INODE, b"", "", Kind.FOLDER)
        self._nodes: dict[int, Node] = {ROOT_INODE: root}
        self._by_name: dict[tuple[int, bytes], Node] = {}
        self._children: dict[int, list[Node]] = {ROOT_INODE: []}
        self._numbers = dict(numbers or {})
        self._next_inode = next_inode
        for path in devices:
            self.add(path)
        for name in virtual:
            self._add_path(f"{CONTROL_FOLDER}/{name}", Kind.VIRTUAL)

    def node(self, inode: int) -> Node | None:
        return self._nodes.get(inode)

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """The node of that name; `.` and `..` as well, since NFS export asks for them."""
        if name == b".":
            return self._nodes.get(parent)
        if name == b"..":
            folder = self._nodes.get(parent)
            return None if folder is None else self._nodes.get(folder.parent)
        return self._by_name.get((parent, name))

    def children(self, inode: int) -> Sequence[Node]:
        """In the order in which they were added."""
        return self._children.get(inode, ())

    def numbers(self) -> dict[str, int]:
        """Path → inode, of everything but the root; also of what may come back."""
        present = {node.path: node.inode for node in self._nodes.values() if node.path}
        return {**self._numbers, **present}

    @property
    def next_inode(self) -> int:
        """Not used so far, as none above it."""
        return self._next_inode

    def devices(self) -> list[Node]:
        return [node for node in self._nodes.values() if node.kind is Kind.DEVICE]

    def folders_in(self, inode: int) -> int:
        """How many folders it holds: 2 more is its link count."""
        return sum(node.kind is Kind.FOLDER for node in self.children(inode))

    def add(self, path: str) -> Node:
        """A device file; its folders come with it."""
        return self._add_path(path, Kind.DEVICE)

    def remove(self, node: Node) -> None:
        """Forget a device file; its folder stays."""
        del self._nodes[node.inode]
        del self._by_name[node.parent, node.name]
        self._children[node.parent].remove(node)

    def _add_path(self, path: str, kind: Kind) -> Node:
        *folders, last = path.split("/")
        if kind is Kind.DEVICE and path.split("/")[0] == CONTROL_FOLDER:
            raise MountError(f"file {path!r}: the name {CONTROL_FOLDER} is taken")
        parent = self._nodes[ROOT_INODE]
        for name in folders:
            parent = self._add(parent, name, Kind.FOLDER)
        return self._add(parent, last, kind)

    def _add(self, parent: Node, name: str, kind: Kind) -> Node:
        encoded = _encoded(name)
        existing = self._by_name.get((parent.inode, encoded))
        if existing is not None:
            if kind is Kind.FOLDER is existing.kind:
                return existing
            raise MountError(f"file {existing.path!r}: there are two of this name")
        path = f"{parent.path}/{name}" if parent.path else name
        is_control = path.split("/")[0] == CONTROL_FOLDER
        node = Node(self._number(path), parent.inode, encoded, path, kind, is_control)
        self._nodes[node.inode] = node
        self._by_name[parent.inode, encoded] = node
        self._children[parent.inode].append(node)
        if kind is Kind.FOLDER:
            self._children[node.inode] = []
        return node

    def _number(self, path: str) -> int:
        known = self._numbers.pop(path, None)
        if known is None:
            known, self._next_inode = self._next_inode, self._next_inode + 1
        return known

    def forget(self, path: str) -> None:
        """What comes back under this name, if anything does, is something else."""
        self._numbers.pop(path, None)


def _encoded(name: str) -> bytes:
    """The name as bytes. Names come from a target, so they are checked, never asserted."""
    encoded = name.encode("utf-8", "surrogateescape")
    if encoded in {b"", b".", b".."} or b"\0" in encoded or len(encoded) > _NAME_BYTES_MAX:
        raise MountError(f"name {name!r}: can't be the name of a file")
    return encoded
