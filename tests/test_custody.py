"""What a worker leaves with its supervisor, and what the next one finds."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion_iscsifs import custody as module
from orion_iscsifs.custody import ISID, Custody, receive
from orion_iscsifs.initiator import claim, identity
from orion_iscsifs.initiator.claim import hold_lun
from orion_iscsifs.initiator.identity import hold_isid


class Keeper:
    """A supervisor's side that holds what it is given."""

    def __init__(self) -> None:
        self.line, self.worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kept: dict[str, int] = {}

    def listen(self) -> None:
        while (received := receive(self.line)) is not None:
            message, descriptors = received
            if "keep" in message:
                self.drop(message["keep"])
                (self.kept[message["keep"]],) = descriptors
            else:
                self.drop(message["drop"])

    def drop(self, name: str) -> None:
        if name in self.kept:
            os.close(self.kept.pop(name))

    def heir(self) -> Custody:
        """The next worker's, in this same process: it gets copies."""
        self.listen()
        made = Custody()
        copies = {name: os.dup(descriptor) for name, descriptor in self.kept.items()}
        made.attach(self.worker, copies, keeps=True, takeovers=1)
        return made

    def close(self) -> None:
        for name in list(self.kept):
            self.drop(name)
        self.line.close()
        self.worker.close()


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()


@pytest.fixture
def first(keeper: Keeper) -> Custody:
    made = Custody()
    made.attach(keeper.worker, {}, keeps=True, takeovers=0)
    return made


def use(monkeypatch: pytest.MonkeyPatch, custody: Custody) -> None:
    """Instead of the process's own."""
    for user in (module, identity, claim):
        monkeypatch.setattr(user, "custody", custody)


def test_a_descriptor_outlives_who_kept_it(keeper: Keeper, first: Custody, tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(file, b"kept")
    first.keep("name", file)
    os.close(file)
    heir = keeper.heir()
    assert heir.is_takeover
    peeked, found = heir.peek("name"), heir.inherit("name")
    assert found is not None
    assert found == peeked
    assert os.pread(found, 10, 0) == b"kept"
    assert heir.inherit("name") is None
    # Not complete yet: what is released goes back for the next try.
    heir.release("name", found)
    assert heir.inherit("name") == found
    heir.resumed()
    heir.release("name", found)
    keeper.listen()
    assert not keeper.kept


def test_later_things_replace_earlier_ones(keeper: Keeper, first: Custody) -> None:
    for text in (b"one", b"two"):
        file = os.memfd_create("test")
        os.write(file, text)
        first.keep("name", file)
        os.close(file)
    heir = keeper.heir()
    found = heir.inherit("name")
    assert found is not None
    assert os.pread(found, 10, 0) == b"two"
    os.close(found)


def test_nothing_is_kept_where_nothing_may_be_taken_over(keeper: Keeper) -> None:
    custody = Custody()
    custody.attach(keeper.worker, {}, keeps=False, takeovers=0)
    file = os.memfd_create("test")
    custody.keep("name", file)
    custody.release("name", file)
    keeper.listen()
    assert not keeper.kept
    with pytest.raises(OSError, match="Bad file"):
        os.close(file)


def test_without_a_supervisor() -> None:
    custody = Custody()
    file = os.memfd_create("test")
    custody.keep("name", file)
    custody.tell(ready=True)
    custody.release("name", file)
    assert custody.waiting("") == custody.heirlooms("") == []
    assert custody.supervisor_pid is None


def test_the_end_of_the_line(keeper: Keeper) -> None:
    assert receive(keeper.line) is None
    keeper.worker.close()
    with pytest.raises(EOFError):
        receive(keeper.line)


def test_an_isid_stays_with_its_path(
    keeper: Keeper, first: Custody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which the paths are opened again, and whoever else comes meanwhile."""
    use(monkeypatch, first)
    with hold_isid(tmp_path, "iqn.a", "p1") as one, hold_isid(tmp_path, "iqn.a", "p2") as two:
        # The worker dies here: what follows happens before its own descriptors are closed, which
        # changes nothing, since the supervisor's are the same locks.
        heir = keeper.heir()
        use(monkeypatch, Custody())
        with hold_isid(tmp_path, "iqn.a", "p1") as stranger:
            assert stranger not in {one, two}
        use(monkeypatch, heir)
        assert len(heir.waiting(ISID)) == 2
        with hold_isid(tmp_path, "iqn.a", "p2") as again:
            assert again == two
            assert len(heir.waiting(ISID)) == 1
        assert len(heir.waiting(ISID)) == 2  # that try has failed: the takeover is not complete
        with hold_isid(tmp_path, "iqn.a", "p3") as third, hold_isid(tmp_path, "iqn.b", "p1"):
            assert third not in {one, two}
        with hold_isid(tmp_path, "iqn.a", "p1") as first_again:
            assert first_again == one
            heir.resumed()
        use(monkeypatch, first)


async def test_a_claim_is_held_on(
    keeper: Keeper, first: Custody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, first)
    async with hold_lun(tmp_path, "naa.1", "/mnt/a", patience_s=0) as claimed:
        claimed.reserved()
        heir = keeper.heir()
        use(monkeypatch, heir)
        async with hold_lun(tmp_path, "naa.1", "/mnt/a", patience_s=0) as again:
            assert again.was_reserved
            heir.resumed()
        use(monkeypatch, first)
    keeper.listen()
    assert not keeper.kept
    with next((tmp_path / "claims").iterdir()).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
