"""Names and inodes of a mount."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import MountError
from orion_iscsifs.fuse.tree import ROOT_INODE, Kind, Tree

IQN = "iqn.2024-01.org.example:disk"


def names(tree: Tree, inode: int) -> list[bytes]:
    return [node.name for node in tree.children(inode)]


def test_one_lun() -> None:
    tree = Tree(["lun1"])
    assert names(tree, ROOT_INODE) == [b"lun1"]
    node = tree.lookup(ROOT_INODE, b"lun1")
    assert node is not None
    assert (node.kind, node.path, tree.node(node.inode)) == (Kind.DEVICE, "lun1", node)
    assert tree.lookup(ROOT_INODE, b"lun2") is None
    assert tree.lookup(node.inode, b"x") is None


def test_several_targets_and_the_control_folder() -> None:
    tree = Tree([f"{IQN}/lun0", f"{IQN}/lun1", "eui.1/lun0"], ["status.json", "metrics"])
    assert names(tree, ROOT_INODE) == [IQN.encode(), b"eui.1", b".orion"]
    assert tree.folders_in(ROOT_INODE) == 3
    assert [node.path for node in tree.devices()] == [
        f"{IQN}/lun0",
        f"{IQN}/lun1",
        "eui.1/lun0",
    ]
    control = tree.lookup(ROOT_INODE, b".orion")
    assert control is not None
    assert control.is_control
    assert names(tree, control.inode) == [b"status.json", b"metrics"]
    assert tree.lookup(control.inode, b"..") == tree.node(ROOT_INODE)
    assert tree.lookup(control.inode, b".") == control
    assert tree.lookup(999, b"..") is None


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a"],
        ["a", "a/b"],
        ["a/b", "a"],
        [".orion"],
        [".orion/x"],
        ["../x"],
        ["a//b"],
        [""],
        ["."],
        ["x" * 256],
        ["a\x00b"],
    ],
)
def test_names_that_a_hostile_target_might_send(paths: list[str]) -> None:
    with pytest.raises(MountError) as caught:
        Tree(paths)
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(max_size=8), max_size=6))
def test_every_node_is_found_by_its_name(paths: list[str]) -> None:
    try:
        tree = Tree(paths, ["status.json"])
    except MountError:
        return
    found = {node.path for node in tree.devices()}
    assert found == set(paths)
    waiting, inodes = [ROOT_INODE], set()
    while waiting:
        inode = waiting.pop()
        inodes.add(inode)
        for child in tree.children(inode):
            assert tree.lookup(inode, child.name) == child
            assert tree.node(child.inode) == child
            waiting.append(child.inode)
    assert inodes == set(range(1, len(inodes) + 1))


def test_files_come_and_go_and_inodes_are_never_used_again() -> None:
    tree = Tree(["lun1", "lun2"], ["metrics"])
    gone = tree.lookup(ROOT_INODE, b"lun2")
    assert gone is not None
    tree.remove(gone)
    assert names(tree, ROOT_INODE) == [b"lun1", b".orion"]
    assert tree.lookup(ROOT_INODE, b"lun2") is None
    assert tree.node(gone.inode) is None
    again = tree.add("lun2")
    assert tree.lookup(ROOT_INODE, b"lun2") == again
    assert again.inode != gone.inode
    assert len({node.inode for node in tree.devices()}) == 2
    assert tree.add(f"{IQN}/lun7").parent == tree.lookup(ROOT_INODE, IQN.encode()).inode  # type: ignore[union-attr]
    with pytest.raises(MountError, match="two of this name"):
        tree.add("lun1")
