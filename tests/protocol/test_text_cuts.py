"""Text exchanges cut anywhere and hostile peers, both roles (RFC 7143 §§6.4, 11.10, 11.11)."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.errors import OrionError, ProtocolViolation
from orion_iscsifs.protocol.pdu import NO_TAG, TextRequest, TextResponse
from orion_iscsifs.protocol.text import Pair, encode_text
from tests.protocol.test_text_negotiation import ALL, BASE, ITT, TTT, exchange, join, responder

LEFT = st.lists(
    st.sampled_from(
        [("InitiatorAlias", "left é"), ("MaxRecvDataSegmentLength", "512"), ("SendTargets", "All")]
    ),
    unique_by=lambda pair: pair[0],
)
RIGHT = st.lists(
    st.sampled_from([("TargetAlias", "right"), ("MaxRecvDataSegmentLength", "0x400")]),
    unique_by=lambda pair: pair[0],
)


@given(
    left_text=LEFT,
    right_text=RIGHT,
    left_bytes=st.integers(1, 200),
    right_bytes=st.integers(1, 200),
)
def test_any_text_cut_anywhere_has_one_outcome(
    left_text: list[Pair], right_text: list[Pair], left_bytes: int, right_bytes: int
) -> None:
    left = exchange(replace(BASE, max_send_data_segment_length=left_bytes))
    right = responder(replace(BASE, max_send_data_segment_length=right_bytes))
    right.propose(right_text)
    join(left, right, left_text)
    assert left.failure is None
    said = dict(left_text) if "SendTargets" in dict(left_text) else dict(left_text + right_text)
    mine = dict(left_text)
    assert left.parameters.initiator_alias == mine.get("InitiatorAlias", "me")
    assert right.parameters.initiator_alias == mine.get("InitiatorAlias", "me")
    assert left.parameters.target_alias == said.get("TargetAlias", "old")
    theirs = {} if "SendTargets" in mine else dict(right_text)
    key = "MaxRecvDataSegmentLength"
    assert left.parameters.max_recv_data_segment_length == int(mine.get(key, "65536"), 0)
    assert right.parameters.max_send_data_segment_length == int(mine.get(key, str(right_bytes)), 0)
    assert left.parameters.max_send_data_segment_length == int(theirs.get(key, str(left_bytes)), 0)
    assert right.parameters.max_recv_data_segment_length == int(theirs.get(key, "65536"), 0)


KEYS = ["SendTargets", "TargetAlias", "TargetName", "TargetAddress", "InitiatorAlias", "X-a"]
KEYS += ["MaxRecvDataSegmentLength", "MaxBurstLength", "OFMarker"]
TEXT = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from(["", "All", "512", "Reject", "a,b", "é"])),
        max_size=4,
    ).map(encode_text),
)


@given(
    responses=st.lists(
        st.builds(
            TextResponse,
            initiator_task_tag=st.sampled_from([ITT, ITT, ITT, 0]),
            final=st.booleans(),
            continued=st.booleans(),
            target_transfer_tag=st.sampled_from([TTT, NO_TAG]),
            data=TEXT,
        ),
        max_size=6,
    ),
    text=st.sampled_from([[], ALL, [("InitiatorAlias", "x" * 200)]]),
)
def test_hostile_target(responses: list[TextResponse], text: list[Pair]) -> None:
    left = exchange(replace(BASE, max_send_data_segment_length=64), text_bytes_max=100)
    left.start(text)
    try:
        for item in responses:
            if left.receive(item) is None:
                break
    except OrionError as error:
        assert "\n" not in error.line  # noqa: PT017 - any of many errors, none is expected
        assert left.parameters == replace(BASE, max_send_data_segment_length=64)
    assert left.done or left.parameters.initiator_alias == "me"


@given(
    requests=st.lists(
        st.builds(
            TextRequest,
            initiator_task_tag=st.sampled_from([ITT, ITT, NO_TAG]),
            final=st.booleans(),
            continued=st.booleans(),
            immediate=st.booleans(),
            target_transfer_tag=st.sampled_from([NO_TAG, 1, 2, 3]),
            data=TEXT,
        ),
        max_size=8,
    )
)
def test_hostile_initiator(requests: list[TextRequest]) -> None:
    right = responder(replace(BASE, max_send_data_segment_length=64))
    for item in requests:
        try:
            answer = right.receive(item)
        except ProtocolViolation as error:
            assert error.pdu == "Text Request"  # noqa: PT017 - any of many, none is expected
        else:
            assert len(answer.data) <= 64 or right.parameters.max_send_data_segment_length > 64
            assert answer.final == (answer.target_transfer_tag == NO_TAG)
            assert item.final or not answer.final
