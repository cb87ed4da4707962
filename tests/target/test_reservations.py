"""Persistent reservations at the target: the rules, and how they act on commands."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.protocol.pdu import R2T, ScsiResponse
from orion_iscsifs.scsi import cdb, sense
from orion_iscsifs.scsi import reservation as codec
from orion_iscsifs.scsi.reservation import (
    InAction,
    OutAction,
    OutParameters,
    ReservationType,
    ReserveOut,
    TransportId,
)
from orion_iscsifs.scsi.sense import SenseData, Status
from orion_iscsifs.target import Portal, RamDevice, Running, serve
from orion_iscsifs.target.reservations import (
    INVALID_RELEASE,
    REGISTRATIONS_PREEMPTED,
    RESERVATIONS_PREEMPTED,
    RESERVATIONS_RELEASED,
    Conflict,
    Effects,
    Nexus,
    Reservations,
    Unacceptable,
)
from tests.target.client import INITIATOR, IQN, SIZE, Client, config, data_out, dialled

A: Nexus = ("iqn.a", b"A" * 6, 1)
B: Nexus = ("iqn.b", b"B" * 6, 1)
C: Nexus = ("iqn.c", b"C" * 6, 2)
WE, EA = ReservationType.WRITE_EXCLUSIVE, ReservationType.EXCLUSIVE_ACCESS
WE_RO = ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
WE_AR = ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS
SHARED = [kind for kind in ReservationType if kind not in (WE, EA)]
READ, WRITE = cdb.read(0, 1), cdb.write(0, 1)


def do(
    state: Reservations,
    nexus: Nexus,
    action: OutAction,
    key: int = 0,
    other: int = 0,
    kind: int = WE_RO,
    *,
    aptpl: bool = False,
) -> Effects:
    command = ReserveOut(action, 0, kind, codec.OUT_BYTES)
    parameters = OutParameters(key=key, service_action_key=other, aptpl=aptpl)
    return state.carry_out(nexus, command, parameters)


def reserved(kind: ReservationType, *others: Nexus) -> Reservations:
    """`A` holds it with key 0xA; the others are registered with 0xB, 0xC."""
    state = Reservations()
    for nexus, key in zip((A, *others), (0xA, 0xB, 0xC), strict=False):
        do(state, nexus, OutAction.REGISTER, 0, key)
    do(state, A, OutAction.RESERVE, 0xA, kind=kind)
    return state


# -- the table of conflicts ------------------------------------------------------------------------

ALWAYS = [
    cdb.inquiry(),
    cdb.test_unit_ready(),
    cdb.report_luns(),
    cdb.request_sense(),
    cdb.read_capacity_10(),
    cdb.read_capacity_16(),
    codec.reserve_in(InAction.READ_KEYS, 8),
    cdb.start_stop_unit(start=True),
    cdb.prevent_allow_medium_removal(prevent=False),
]
READS = [READ, cdb.verify(0, 1), cdb.get_lba_status(0)]
CHANGES = [
    WRITE,
    cdb.unmap(24),
    cdb.write_same(0, 1),
    cdb.compare_and_write(0, 1),
    cdb.synchronize_cache(),
    cdb.mode_sense_6(0x3F),
    cdb.start_stop_unit(start=False),
    cdb.prevent_allow_medium_removal(prevent=True),
]


@pytest.mark.parametrize("kind", list(ReservationType))
def test_what_a_nexus_without_registration_may_do(kind: ReservationType) -> None:
    state = reserved(kind)
    assert not any(state.conflicts(C, block) for block in ALWAYS)
    exclusive = kind in (EA, 0x6, 0x8)
    assert {state.conflicts(C, block) for block in READS} == {exclusive}
    assert all(state.conflicts(C, block) for block in CHANGES)


@pytest.mark.parametrize("kind", list(ReservationType))
def test_what_registered_nexuses_may_do(kind: ReservationType) -> None:
    state = reserved(kind, B)
    everything = [*ALWAYS, *READS, *CHANGES]
    assert not any(state.conflicts(A, block) for block in everything)
    assert any(state.conflicts(B, block) for block in everything) == (kind in (WE, EA))


def test_without_a_reservation_nothing_conflicts() -> None:
    state = Reservations()
    do(state, A, OutAction.REGISTER, 0, 0xA)
    assert not any(state.conflicts(B, block) for block in [*ALWAYS, *READS, *CHANGES])


# -- the service actions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nexus", "action", "key"),
    [
        (A, OutAction.REGISTER, 0xF),
        (B, OutAction.REGISTER, 0xB),
        *((A, action, 0xF) for action in OutAction if action < 6),
        *((B, action, 0) for action in OutAction if 0 < action < 6),
    ],
)
def test_a_wrong_key_is_a_conflict(nexus: Nexus, action: OutAction, key: int) -> None:
    state = reserved(WE_RO)
    with pytest.raises(Conflict):
        do(state, nexus, action, key, 0xA)
    assert state.keys == {A: 0xA}


def test_registering() -> None:
    state = Reservations()
    do(state, A, OutAction.REGISTER, 0, 0)
    assert (state.keys, state.generation) == ({}, 0), "nothing to do"
    do(state, A, OutAction.REGISTER, 0, 0xA)
    do(state, A, OutAction.REGISTER, 0xA, 0xAA)
    do(state, B, OutAction.REGISTER_AND_IGNORE_EXISTING_KEY, 0x77, 0xB)
    do(state, B, OutAction.REGISTER_AND_IGNORE_EXISTING_KEY, 0, 0xBB)
    assert (state.keys, state.generation) == ({A: 0xAA, B: 0xBB}, 4)
    do(state, A, OutAction.REGISTER, 0xAA, 0)
    assert (state.keys, state.generation) == ({B: 0xBB}, 5)


@pytest.mark.parametrize("kind", list(ReservationType))
def test_the_holder_withdraws_its_registration(kind: ReservationType) -> None:
    state = reserved(kind, B)
    effects = do(state, A, OutAction.REGISTER, 0xA, 0)
    if kind.all_registrants:
        assert (state.kind, effects.attentions) == (kind, [])
        assert do(state, B, OutAction.REGISTER, 0xB, 0).attentions == []
    else:
        told = [] if kind in (WE, EA) else [(B, RESERVATIONS_RELEASED)]
        assert effects.attentions == told
    assert state.kind is None


def test_reserving_again() -> None:
    state = reserved(WE_RO, B)
    do(state, A, OutAction.RESERVE, 0xA, kind=WE_RO)
    for nexus, key, kind in ((A, 0xA, EA), (B, 0xB, WE_RO)):
        with pytest.raises(Conflict):
            do(state, nexus, OutAction.RESERVE, key, kind=kind)
    assert state.holder == codec.Holder(0xA, WE_RO)
    shared = reserved(WE_AR, B)
    do(shared, B, OutAction.RESERVE, 0xB, kind=WE_AR)
    assert shared.holder == codec.Holder(0, WE_AR)


@pytest.mark.parametrize("kind", [0, 2, 4, 9, 15])
def test_a_type_that_is_none(kind: int) -> None:
    state = Reservations()
    do(state, A, OutAction.REGISTER, 0, 0xA)
    with pytest.raises(Unacceptable, match="invalid field in CDB"):
        do(state, A, OutAction.RESERVE, 0xA, kind=kind)


@pytest.mark.parametrize("kind", list(ReservationType))
def test_releasing(kind: ReservationType) -> None:
    state = reserved(kind, B)
    wrong = EA if kind is not EA else WE
    with pytest.raises(Unacceptable) as raised:
        do(state, A, OutAction.RELEASE, 0xA, kind=wrong)
    assert raised.value.reason == INVALID_RELEASE
    if not kind.all_registrants:
        assert do(state, B, OutAction.RELEASE, 0xB, kind=kind).attentions == []
        assert state.kind is kind, "only its holder releases it"
    effects = do(state, A, OutAction.RELEASE, 0xA, kind=kind)
    assert effects.attentions == ([] if kind in (WE, EA) else [(B, RESERVATIONS_RELEASED)])
    assert state.kind is None
    assert do(state, A, OutAction.RELEASE, 0xA, kind=kind).attentions == []


def test_clearing() -> None:
    state = reserved(EA, B, C)
    effects = do(state, B, OutAction.CLEAR, 0xB)
    assert effects.attentions == [(A, RESERVATIONS_PREEMPTED), (C, RESERVATIONS_PREEMPTED)]
    assert (state.keys, state.kind) == ({}, None)


@pytest.mark.parametrize("action", [OutAction.PREEMPT, OutAction.PREEMPT_AND_ABORT])
def test_preempting_the_holder_takes_the_reservation(action: OutAction) -> None:
    state = reserved(WE_RO, B, C)
    effects = do(state, B, action, 0xB, 0xA, WE_RO)
    assert effects.attentions == [(A, REGISTRATIONS_PREEMPTED)]
    assert effects.aborted == ([A] if action is OutAction.PREEMPT_AND_ABORT else [])
    assert state.holder == codec.Holder(0xB, WE_RO)
    assert state.keys == {B: 0xB, C: 0xC}
    with pytest.raises(Conflict):
        do(state, A, OutAction.RESERVE, 0xA)


def test_preempting_with_another_type_tells_the_others() -> None:
    effects = do(state := reserved(WE_RO, B, C), B, OutAction.PREEMPT, 0xB, 0xA, EA)
    assert effects.attentions == [(A, REGISTRATIONS_PREEMPTED), (C, RESERVATIONS_RELEASED)]
    assert state.kind is EA


def test_preempting_a_registration_leaves_the_reservation() -> None:
    state = reserved(WE_RO, B, C)
    assert do(state, B, OutAction.PREEMPT, 0xB, 0xC).attentions == [(C, REGISTRATIONS_PREEMPTED)]
    assert state.holder == codec.Holder(0xA, WE_RO)
    with pytest.raises(Conflict):
        do(state, B, OutAction.PREEMPT, 0xB, 0x1234)
    with pytest.raises(Unacceptable, match="parameter list"):
        do(state, B, OutAction.PREEMPT, 0xB, 0)


def test_preempting_all_registrants() -> None:
    state = reserved(WE_AR, B, C)
    effects = do(state, B, OutAction.PREEMPT, 0xB, 0, WE_RO)
    assert effects.attentions == [(A, REGISTRATIONS_PREEMPTED), (C, REGISTRATIONS_PREEMPTED)]
    assert (state.keys, state.holder) == ({B: 0xB}, codec.Holder(0xB, WE_RO))


def test_a_nexus_that_preempts_its_own_key_stays() -> None:
    state = reserved(WE_RO)
    do(state, B, OutAction.REGISTER, 0, 0xA)
    do(state, B, OutAction.PREEMPT, 0xA, 0xA, WE_RO)
    assert (state.keys, state.holder) == ({B: 0xA}, codec.Holder(0xA, WE_RO))


@pytest.mark.parametrize("aptpl", [False, True])
def test_a_loss_of_power(aptpl: bool) -> None:
    state = Reservations()
    do(state, A, OutAction.REGISTER, 0, 0xA, aptpl=aptpl)
    do(state, A, OutAction.RESERVE, 0xA)
    state.lose_power()
    assert state.generation == 0
    assert (state.keys, state.kind) == (({A: 0xA}, WE_RO) if aptpl else ({}, None))


def test_what_would_not_last_is_not_promised() -> None:
    state = Reservations()
    assert state.capabilities.persist_capable
    state.lasting = False
    assert not state.capabilities.persist_capable
    with pytest.raises(Unacceptable, match="parameter list"):
        do(state, A, OutAction.REGISTER, 0, 0xA, aptpl=True)
    do(state, A, OutAction.REGISTER, 0, 0xA)
    assert not state.capabilities.persist_active


ACTIONS = st.tuples(
    st.sampled_from([A, B, C]),
    st.sampled_from(OutAction),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 8),
)


@given(st.lists(ACTIONS, max_size=60))
def test_whatever_happens_the_state_makes_sense(
    actions: list[tuple[Nexus, OutAction, int, int, int]],
) -> None:
    state = Reservations()
    for nexus, action, key, other, kind in actions:
        before = dict(state.keys), state.kind, state.generation
        try:
            effects = do(state, nexus, action, key, other, kind)
        except (Conflict, Unacceptable):
            assert before == (state.keys, state.kind, state.generation), "refused: no change"
            continue
        assert state.generation - before[2] in (0, 1)
        assert all(told != nexus for told, _ in effects.attentions)
        assert nexus not in effects.aborted
        assert 0 not in state.keys.values()
        writers = [one for one in (A, B, C) if not state.conflicts(one, WRITE)]
        if state.kind is None:
            assert state.holder is None
            assert len(writers) == 3
        else:
            assert state.holder is not None
            assert writers, "somebody may always write"
            assert set(writers) <= state.keys.keys()
            assert len(writers) == 1 or state.kind in SHARED


# -- on the wire -----------------------------------------------------------------------------------


@asynccontextmanager
async def two_hosts() -> AsyncIterator[tuple[Running, RamDevice, Client, Client]]:
    portals = [Portal("127.0.0.1", 0, 1), Portal("127.0.0.1", 0, 2)]
    async with (
        RamDevice(SIZE) as disk,
        serve([config(disk)], portals) as running,
        dialled(running) as first,
        dialled(running, portal=1) as second,
    ):
        for client in (first, second):
            await client.log_in(IQN)
            await client.settle()
        yield running, disk, first, second


async def out(
    client: Client, action: OutAction, key: int = 0, other: int = 0, *, aptpl: bool = False
) -> ScsiResponse:
    data = codec.encode_out(OutParameters(key=key, service_action_key=other, aptpl=aptpl))
    block = codec.reserve_out(action, WE_RO)
    await client.send(client.command(block, write=len(data), data=data))
    return await client.expect(ScsiResponse)


async def hold(client: Client, key: int, *, aptpl: bool = False) -> None:
    assert (await out(client, OutAction.REGISTER, 0, key, aptpl=aptpl)).status == 0
    assert (await out(client, OutAction.RESERVE, key)).status == 0


async def keys(client: Client) -> tuple[int, ...]:
    data, _ = await client.run(codec.reserve_in(InAction.READ_KEYS, 256), read=256)
    return codec.decode_keys(data).keys


async def test_a_conflict_asks_for_no_data() -> None:
    async with two_hosts() as (_, disk, first, second):
        await hold(first, 0xA)
        await second.send(second.command(cdb.write(0, 512), write=512 * 512))
        response = await second.expect(ScsiResponse)
        assert response.status == Status.RESERVATION_CONFLICT
        assert (await first.write(0, b"1" * 512)).status == 0
        assert await second.read(0, 512) == b"1" * 512
        assert bytes(disk.view[:512]) == b"1" * 512


async def test_everybody_is_named() -> None:
    async with two_hosts() as (_, _disk, first, second):
        await hold(first, 0xA)
        await out(second, OutAction.REGISTER, 0, 0xB)
        data, _ = await second.run(codec.reserve_in(InAction.READ_FULL_STATUS, 512), read=512)
        found = codec.decode_full_status(data).registrations
        assert [(one.key, one.is_holder, one.relative_port) for one in found] == [
            (0xA, True, 1),
            (0xB, False, 2),
        ]
        assert all(one.initiator.name == INITIATOR for one in found)
        assert all(isinstance(one.initiator, TransportId) for one in found)


async def test_who_is_preempted_hears_of_it_and_may_write_no_more() -> None:
    async with two_hosts() as (_, _disk, first, second):
        await hold(first, 0xA)
        await out(second, OutAction.REGISTER, 0, 0xB)
        assert (await out(second, OutAction.PREEMPT_AND_ABORT, 0xB, 0xA)).status == 0
        assert await first.sense(cdb.test_unit_ready()) == REGISTRATIONS_PREEMPTED
        assert (await first.write(0, b"1" * 512)).status == Status.RESERVATION_CONFLICT
        assert await keys(first) == (0xB,)


async def test_preempt_and_abort_ends_a_write_that_waits_for_its_data() -> None:
    """The data arrive after all: they must not reach the disk."""
    async with two_hosts() as (running, disk, first, second):
        await hold(first, 0xA)
        await out(second, OutAction.REGISTER, 0, 0xB)
        command = first.command(cdb.write(0, 512), write=512 * 512)
        await first.send(command)
        r2t = await first.expect(R2T)
        assert (await out(second, OutAction.PREEMPT_AND_ABORT, 0xB, 0xA)).status == 0
        content = b"1" * r2t.desired_data_transfer_length
        await first.send(
            data_out(command, content, offset=r2t.buffer_offset, ttt=r2t.target_transfer_tag)
        )
        assert await first.sense(cdb.test_unit_ready()) == REGISTRATIONS_PREEMPTED
        assert running.stats.late_data_out > 0
        assert not any(disk.view[: 512 * 512])


@pytest.mark.parametrize("aptpl", [False, True])
async def test_a_restart_of_the_target(aptpl: bool) -> None:
    async with two_hosts() as (running, _, first, _second):
        await hold(first, 0xA, aptpl=aptpl)
        await running.restart()
        async with dialled(running) as again:
            await again.log_in(IQN)
            await again.settle()
            assert await keys(again) == ((0xA,) if aptpl else ())
            if aptpl:
                assert (await again.write(0, b"1" * 512)).status == 0


async def test_a_registration_outlives_its_session() -> None:
    async with two_hosts() as (running, _disk, first, second):
        await hold(first, 0xA)
        running.drop_connections()
        async with dialled(running) as again, dialled(running, portal=1) as other:
            for client in (again, other):
                await client.log_in(IQN)
                await client.settle()
            assert (await again.write(0, b"1" * 512)).status == 0
            assert (await other.write(0, b"2" * 512)).status == Status.RESERVATION_CONFLICT
        del second


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (codec.reserve_in(InAction(3), 64)[:1] + b"\x04" + bytes(5) + b"\x00\x40\x00", None),
        (codec.reserve_out(OutAction.REGISTER_AND_MOVE), sense.INVALID_FIELD_IN_CDB),
        (codec.reserve_out(OutAction.REGISTER, 0, 20), sense.PARAMETER_LIST_LENGTH_ERROR),
    ],
)
async def test_what_is_refused(block: bytes, reason: SenseData | None) -> None:
    async with two_hosts() as (_, _disk, first, _second):
        if reason is None:
            assert await first.sense(block, read=64) == sense.INVALID_FIELD_IN_CDB
            return
        await first.send(first.command(block, write=24, data=bytes(24)))
        response = await first.expect(ScsiResponse)
        assert sense.sense_of_response(response.data) == reason


async def test_flags_that_are_not_supported_are_refused() -> None:
    async with two_hosts() as (_, _disk, first, _second):
        for flags in (
            OutParameters(service_action_key=1, all_target_ports=True),
            OutParameters(service_action_key=1, specify_initiator_ports=True),
        ):
            data = codec.encode_out(flags)
            block = codec.reserve_out(OutAction.REGISTER)
            await first.send(first.command(block, write=len(data), data=data))
            response = await first.expect(ScsiResponse)
            reason = sense.sense_of_response(response.data)
            assert reason == sense.INVALID_FIELD_IN_PARAMETER_LIST
        assert await keys(first) == ()
