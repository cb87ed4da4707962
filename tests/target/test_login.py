"""Logging in to the embedded target, and discovery."""

import pytest

from orion_iscsifs.config import Secret
from orion_iscsifs.errors import AuthenticationFailed, LoginError, TargetNotFound
from orion_iscsifs.protocol.login import Credentials
from orion_iscsifs.protocol.pdu import (
    LogoutRequest,
    LogoutResponse,
    Reject,
    RejectReason,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.scsi.cdb import OpCode
from orion_iscsifs.target import Chap, RamDevice, TargetConfig, serve
from orion_iscsifs.target.settings import Limits
from tests.target.client import IQN, ISID, SIZE, TUR, config, dialled, logged_in

# -- login -----------------------------------------------------------------------------------------


async def test_login_read_write_logout() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running:
        async with logged_in(running) as client:
            assert running.stats.logins == 1
            assert running.stats.last_isid == ISID
            assert [session.isid for session in running.sessions] == [ISID]
            assert (await client.write(8, b"x" * 4096)).status == 0
            assert await client.read(8, 4096) == b"x" * 4096
            assert bytes(disk.view[4096:8192]) == b"x" * 4096
            assert running.stats.commands[OpCode.WRITE_10] == 1
            await client.send(LogoutRequest(7, cmd_sn=client.cmd_sn))
            assert (await client.expect(LogoutResponse)).response == 0
            assert await client.closed()
        assert running.sessions == []


async def test_unknown_target() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        dialled(running) as client,
    ):
        with pytest.raises(TargetNotFound):
            await client.log_in("iqn.2026-11.org.example:other")
        assert running.stats.refused_logins == 1


async def test_chap_both_ways_and_refusals() -> None:
    chap = Chap(
        user="me",
        secret=Secret("secret-of-mine"),
        mutual_user="disk",
        mutual_secret=Secret("secret-of-disk"),
    )
    mine = Credentials(user="me", secret=b"secret-of-mine")
    other = Credentials(user="disk", secret=b"secret-of-disk")
    async with RamDevice(SIZE) as disk, serve([config(disk, chap=chap)]) as running:
        async with dialled(running) as client:
            await client.log_in(IQN, credentials=mine, target_credentials=other)
            await client.settle()
        async with dialled(running) as client:
            with pytest.raises(LoginError):
                await client.log_in(IQN)
        async with dialled(running) as client:
            wrong = Credentials(user="me", secret=b"not-the-secret")
            with pytest.raises(AuthenticationFailed):
                await client.log_in(IQN, credentials=wrong)
        async with dialled(running) as client:
            with pytest.raises(LoginError):
                await client.log_in(None, session_type="Discovery")


async def test_a_stranger_is_hung_up_on() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        dialled(running) as client,
    ):
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(48))
        assert await client.closed()


async def test_silence_at_login_ends_the_connection() -> None:
    limits = Limits(login_timeout_s=0.1)
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], limits=limits) as running,
        dialled(running) as client,
    ):
        assert await client.closed()


async def test_a_session_of_one_connection_can_not_be_joined() -> None:
    async with RamDevice(SIZE) as disk, serve([config(disk)]) as running, logged_in(running):
        for tsih in (running.sessions[0].tsih, 0x7777):
            async with dialled(running) as client:
                with pytest.raises(LoginError):
                    await client.log_in(IQN, tsih=tsih, cid=1)
        assert len(running.sessions) == 1


# -- discovery -------------------------------------------------------------------------------------


async def test_send_targets() -> None:
    second = TargetConfig(iqn=IQN + "2", units={})
    portals = [("127.0.0.1", 0), ("127.0.0.1", 0)]
    async with RamDevice(SIZE) as disk, serve([config(disk), second], portals) as running:
        async with dialled(running) as client:
            await client.log_in(None, session_type="Discovery")
            await client.send(TextRequest(5, data=b"SendTargets=All\0", cmd_sn=client.cmd_sn))
            reply = await client.expect(TextResponse)
            addresses = [f"TargetAddress={host}:{port},1" for host, port in running.portals]
            assert bytes(reply.data).decode().split("\0") == [
                f"TargetName={IQN}",
                *addresses,
                f"TargetName={IQN}2",
                *addresses,
                "",
            ]
            assert reply.final
            assert reply.exp_cmd_sn == client.cmd_sn + 1
            client.cmd_sn += 1
            await client.send(client.command(TUR))
            assert (await client.expect(Reject)).reason == RejectReason.COMMAND_NOT_SUPPORTED
        assert running.stats.discoveries == 1
