"""Text Requests in full feature phase at the embedded target (RFC 7143 §6.4, §11.10, App. C)."""

from dataclasses import replace

import pytest

from orion_iscsifs.protocol.keys import Parameters
from orion_iscsifs.protocol.pdu import (
    NO_TAG,
    DataIn,
    Reject,
    RejectReason,
    TextRequest,
    TextResponse,
)
from orion_iscsifs.protocol.text import encode_text
from orion_iscsifs.protocol.text_negotiation import TextExchange
from orion_iscsifs.scsi import cdb
from orion_iscsifs.target import RamDevice, Running, TargetConfig, serve
from tests.target.client import IQN, OFFER, SIZE, Client, config, dialled, logged_in

LENGTH = "MaxRecvDataSegmentLength"


def text(
    data: bytes,
    *,
    tag: int = 5,
    ttt: int = NO_TAG,
    final: bool = True,
    continued: bool = False,
) -> TextRequest:
    request = TextRequest(tag, target_transfer_tag=ttt, data=data, immediate=True)
    request.final, request.continued = final, continued
    return request


async def ask(
    client: Client, data: bytes, *, ttt: int = NO_TAG, final: bool = True, continued: bool = False
) -> TextResponse:
    await client.send(text(data, ttt=ttt, final=final, continued=continued))
    return await client.expect(TextResponse)


async def refused(client: Client, request: TextRequest) -> RejectReason:
    await client.send(request)
    return RejectReason((await client.expect(Reject)).reason)


async def exchange(client: Client, *pairs: tuple[str, str]) -> Parameters:
    """What a whole exchange of the initiator's own machine ends with."""
    assert client.login is not None
    talk = TextExchange(initiator_task_tag=9, parameters=client.login.parameters, immediate=True)
    request: TextRequest | None = talk.start(pairs)
    while request is not None:
        await client.send(request)
        request = talk.receive(await client.expect(TextResponse))
    assert talk.failure is None
    return talk.parameters


def addresses(running: Running) -> list[str]:
    return [f"TargetAddress={host}:{port},1" for host, port in running.portals]


# -- SendTargets -----------------------------------------------------------------------------------


@pytest.mark.checklist(56, "11.10")
async def test_a_normal_session_hears_of_its_own_target_only() -> None:
    other = TargetConfig(iqn=IQN + "2", units={})
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk), other]) as running,
        logged_in(running) as client,
    ):
        own = [f"TargetName={IQN}", *addresses(running), ""]
        for name in ("", IQN):
            reply = await ask(client, f"SendTargets={name}\0".encode())
            assert bytes(reply.data).decode().split("\0") == own
        assert bytes((await ask(client, f"SendTargets={IQN}2\0".encode())).data) == b""
        reply = await ask(client, b"SendTargets=All\0")
        assert bytes(reply.data) == b"SendTargets=Reject\0"


async def test_a_discovery_session_asks_for_all_or_for_one() -> None:
    other = TargetConfig(iqn=IQN + "2", units={})
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk), other]) as running,
        dialled(running) as client,
    ):
        await client.log_in(None, session_type="Discovery")
        one = bytes((await ask(client, f"SendTargets={IQN}2\0".encode())).data).decode()
        assert one.split("\0") == [f"TargetName={IQN}2", *addresses(running), ""]
        assert bytes((await ask(client, b"SendTargets=iqn.2026-11.org.example:no\0")).data) == b""
        assert bytes((await ask(client, b"SendTargets=\0")).data) == b"SendTargets=Reject\0"


@pytest.mark.checklist(28, "6.2")
async def test_a_long_answer_comes_in_pieces() -> None:
    targets = [TargetConfig(iqn=f"{IQN}{number:03}", units={}) for number in range(40)]
    offer = replace(OFFER, max_recv_data_segment_length=512)
    async with serve(targets) as running, dialled(running) as client:
        await client.log_in(None, session_type="Discovery", offer=offer)
        reply = await ask(client, b"SendTargets=All\0")
        found = bytes(reply.data)
        while reply.continued:
            assert not reply.final
            assert len(reply.data) == 512
            reply = await ask(client, b"", ttt=reply.target_transfer_tag)
            found += bytes(reply.data)
        assert reply.final
        assert found.count(b"TargetName=") == 40


# -- negotiation -----------------------------------------------------------------------------------


@pytest.mark.checklist(29, "6.2")
@pytest.mark.checklist(30, "6.2")
async def test_keys_that_may_not_change_are_refused() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        reply = await ask(client, b"X-org.example.fancy=1\0InitialR2T=No\0HeaderDigest=CRC32C\0")
        assert bytes(reply.data).split(b"\0") == [
            b"X-org.example.fancy=NotUnderstood",
            b"InitialR2T=Reject",
            b"HeaderDigest=Reject",
            b"",
        ]
        assert (await client.write(0, b"w" * 4096)).status == 0


@pytest.mark.checklist(14, "13.12")
async def test_a_new_segment_length_of_the_initiator_counts_at_once() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        await exchange(client, (LENGTH, "1024"))
        await client.send(client.command(cdb.read(0, 16), read=8192))
        lengths = []
        while True:
            pdu = await client.expect(DataIn)
            lengths.append(len(pdu.data))
            if pdu.has_status:
                break
        assert lengths == [1024] * 8


@pytest.mark.checklist(14, "13.12")
async def test_a_new_segment_length_of_the_target_counts_when_it_was_told() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        session = running.sessions[0]
        session.texts.propose([(LENGTH, "2048")])
        assert (await exchange(client)).max_send_data_segment_length == 2048
        # The next PDU that is longer breaks the session.
        await client.send(client.command(cdb.write(0, 8), write=4096, data=bytes(4096)))
        assert await client.closed()
        assert "exceeds our MaxRecvDataSegmentLength" in running.stats.last_error


@pytest.mark.checklist(28, "6.2")
async def test_the_initiators_text_may_span_requests() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        whole = encode_text([("X-org.example.one", "1"), ("X-org.example.two", "2")])
        reply = await ask(client, whole[:9], final=False, continued=True)
        assert (bytes(reply.data), reply.final, reply.continued) == (b"", False, False)
        reply = await ask(client, whole[9:], ttt=reply.target_transfer_tag)
        assert bytes(reply.data).count(b"=NotUnderstood\0") == 2
        assert reply.final
        assert reply.target_transfer_tag == NO_TAG


@pytest.mark.checklist(56, "11.10")
async def test_a_new_request_resets_the_exchange() -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        reply = await ask(client, f"{LENGTH}=512\0".encode(), final=False)
        stale = reply.target_transfer_tag
        assert stale != NO_TAG
        reply = await ask(client, b"X-org.example.fancy=1\0")
        assert bytes(reply.data) == b"X-org.example.fancy=NotUnderstood\0"
        # Nothing of the first exchange has happened, and its bookmark is void.
        assert await client.read(0, 4096) == bytes(4096)
        assert running.sessions[0].texts.parameters.max_send_data_segment_length == 65536
        assert await refused(client, text(b"", ttt=stale)) == RejectReason.PROTOCOL_ERROR


@pytest.mark.checklist(31, "6.2.1")
@pytest.mark.parametrize(
    "request_",
    [
        text(b"SendTargets=\0", ttt=77),
        text(b"SendTargets=\0", final=True, continued=True),
        text(f"{LENGTH}=512\0{LENGTH}=1024\0".encode()),
        text(f"{LENGTH}=12\0".encode()),
        text(b"no key at all\0"),
        text(b"SendTargets"),
    ],
    ids=["tag", "C and F", "twice", "range", "no key", "no delimiter"],
)
async def test_a_broken_exchange_is_rejected_and_the_session_lives(request_: TextRequest) -> None:
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        assert await refused(client, request_) == RejectReason.PROTOCOL_ERROR
        assert (await ask(client, b"SendTargets=\0")).final
        assert (await client.write(0, b"w" * 512)).status == 0


@pytest.mark.checklist(31, "6.2.1")
async def test_one_exchange_at_a_time() -> None:
    """Another tag inside an exchange is no second exchange but a broken one (§11.10)."""
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)]) as running,
        logged_in(running) as client,
    ):
        reply = await ask(client, b"", final=False)
        second = text(b"", tag=6, ttt=reply.target_transfer_tag)
        assert await refused(client, second) == RejectReason.PROTOCOL_ERROR
