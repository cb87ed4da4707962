"""Several portals: portal groups, what SendTargets says of them, who may log in where."""

from collections.abc import Sequence

import pytest

from orion_iscsifs.errors import AuthenticationFailed, LoginError, UsageError
from orion_iscsifs.protocol.login import LoginStatus
from orion_iscsifs.protocol.pdu import TextRequest, TextResponse
from orion_iscsifs.target import Portal, RamDevice, Running, TargetConfig, serve
from orion_iscsifs.target.portals import Address
from orion_iscsifs.target.settings import Limits
from tests.target.client import INITIATOR, IQN, SIZE, Client, config, dialled

HERE = "127.0.0.1"
TWO_GROUPS = (Portal(HERE, 0, 1), Portal(HERE, 0, 2), Portal(HERE, 0, 1))


async def addresses(client: Client) -> list[str]:
    await client.send(TextRequest(5, data=b"SendTargets=All\0", immediate=True))
    lines = bytes((await client.expect(TextResponse)).data).decode().split("\0")
    return [line.removeprefix("TargetAddress=") for line in lines if "Address" in line]


def tag(client: Client) -> int | None:
    assert client.login is not None
    return client.login.parameters.target_portal_group_tag


@pytest.mark.checklist(32, "13.9")
async def test_each_portal_has_its_group() -> None:
    portals = [*TWO_GROUPS[:2], Portal(HERE, 0, 0)]
    async with RamDevice(SIZE) as disk, serve([config(disk)], portals) as running:
        for index, group in enumerate((1, 2, 0)):
            async with dialled(running, portal=index) as client:
                await client.log_in(IQN)
                assert tag(client) == group
        async with dialled(running) as client:
            await client.log_in(None, session_type="Discovery")
            assert tag(client) == 1
            listed = [
                f"{host}:{port},{group}"
                for (host, port), group in zip(running.portals, (1, 2, 0), strict=True)
            ]
            assert await addresses(client) == listed


@pytest.mark.checklist(36, "4.4.3")
async def test_one_name_and_isid_at_two_groups_are_two_sessions() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], TWO_GROUPS) as running,
        dialled(running) as first,
        dialled(running, portal=1) as second,
        dialled(running, portal=2) as third,
    ):
        for client in (first, second):
            await client.log_in(IQN)
            await client.settle()
        assert len(running.sessions) == 2
        assert (await second.write(0, b"two" * 512)).status == 0
        assert await first.read(0, 1536) == b"two" * 512
        # The same group again, through its other portal, is a reinstatement.
        await third.log_in(IQN)
        assert await first.closed()
        assert running.stats.reinstatements == 1
        await third.settle()
        assert len(running.sessions) == 2


@pytest.mark.checklist(37, "6.3.4")
@pytest.mark.parametrize(
    ("portal", "change", "status"),
    [
        (1, 0, LoginStatus.CANT_INCLUDE_IN_SESSION),
        (0, 1, LoginStatus.SESSION_DOES_NOT_EXIST),
    ],
    ids=["other group", "other tsih"],
)
async def test_a_session_never_leaves_its_group(
    portal: int, change: int, status: LoginStatus
) -> None:
    limits = Limits(max_connections=4)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], TWO_GROUPS, limits=limits) as running,
        dialled(running) as first,
        dialled(running, portal=portal) as second,
    ):
        await first.log_in(IQN)
        await first.settle()
        with pytest.raises(LoginError) as caught:
            await second.log_in(IQN, tsih=running.sessions[0].tsih + change)
        assert_status(caught.value, status)
        assert await first.read(0, 512) == bytes(512)


def assert_status(error: LoginError, status: LoginStatus) -> None:
    assert (error.status_class, error.status_detail) == (status >> 8, status & 0xFF)


async def test_the_isid_belongs_to_the_session() -> None:
    limits = Limits(max_connections=4)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        dialled(running) as first,
        dialled(running) as second,
    ):
        await first.log_in(IQN)
        await first.settle()
        tsih, isid = running.sessions[0].tsih, bytes.fromhex("80cafe000002")
        with pytest.raises(LoginError) as caught:
            await second.log_in(IQN, tsih=tsih, isid=isid)
        assert_status(caught.value, LoginStatus.SESSION_DOES_NOT_EXIST)


# -- what SendTargets says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed",
    [
        ["10.11.12.13:3260,1"],
        ["[fe80::1]:3260,1", "[2001:db8::1]:3260,1"],
        ["storage.example.org:3260,1", "storage.example.org,2"],
        ["0.0.0.0:3260,1", "192.0.2.1:3260,1", "192.0.2.1:3260,1"],
        ["192.0.2.1:3260"],
        [],
    ],
    ids=["NAT", "link-local", "names", "wildcard and duplicates", "no tag", "nothing"],
)
async def test_the_advertised_addresses_can_be_anything(listed: Sequence[str]) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], advertise=listed) as running,
        dialled(running) as client,
    ):
        await client.log_in(None, session_type="Discovery")
        assert await addresses(client) == listed


async def test_advertised_addresses_may_depend_on_who_asks() -> None:
    def advertise(iqn: str, dialled_: Address) -> list[str]:
        return [f"{dialled_[0]}:{dialled_[1] + 1},{len(iqn)}"]

    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], advertise=advertise) as running,
        dialled(running) as client,
    ):
        await client.log_in(None, session_type="Discovery")
        assert await addresses(client) == [f"{HERE}:{running.portals[0][1] + 1},{len(IQN)}"]
        running.advertise = None
        assert await addresses(client) == [f"{HERE}:{running.portals[0][1]},1"]


async def test_a_wildcard_portal_is_listed_as_it_was_dialled() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)], [("0.0.0.0", 0)]) as running:
        running.portals[0] = (HERE, running.portals[0][1])
        async with dialled(running) as client:
            await client.log_in(None, session_type="Discovery")
            assert await addresses(client) == [f"{HERE}:{running.portals[0][1]},1"]


async def test_an_address_of_another_host_can_not_be_bound() -> None:
    with pytest.raises(UsageError, match=r"portal 192\.0\.2\.1:0"):
        async with serve([], [Portal("192.0.2.1", 0, 3)]):
            pass


# -- access by name --------------------------------------------------------------------------------


async def test_only_known_initiators() -> None:
    def target(name: str, *initiators: str) -> TargetConfig:
        return TargetConfig(iqn=IQN + name, units={}, initiators=frozenset(initiators))

    targets = [target("1", INITIATOR), target("2", "iqn.2026-11.org.example:other")]
    async with serve(targets) as running:
        async with dialled(running) as client:
            await client.log_in(IQN + "1")
        async with dialled(running) as client:
            with pytest.raises(AuthenticationFailed) as caught:
                await client.log_in(IQN + "2")
            assert_status(caught.value, LoginStatus.AUTHORIZATION_FAILURE)
        async with dialled(running) as client:
            await client.log_in(None, session_type="Discovery")
            assert len(await listed_names(client, running)) == 1


async def listed_names(client: Client, running: Running) -> list[str]:
    await client.send(TextRequest(5, data=b"SendTargets=All\0", immediate=True))
    lines = bytes((await client.expect(TextResponse)).data).decode().split("\0")
    names = [line.removeprefix("TargetName=") for line in lines if "TargetName" in line]
    assert set(names) <= {target.iqn for target in running.targets}
    return names
