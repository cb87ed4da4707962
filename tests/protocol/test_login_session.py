"""Where a login belongs: portal groups, and connections that join a session (RFC 7143 §6.3)."""

from dataclasses import replace

import pytest

from orion_iscsifs.errors import LoginError, ProtocolViolation
from orion_iscsifs.protocol.login import (
    LoginStatus,
    Offer,
    Parameters,
    TargetAccess,
    TargetLogin,
    status_error,
)
from tests.protocol.logins import initiator, join, response, target

# -- the portal group ----------------------------------------------------------------------------


@pytest.mark.checklist(32, "6.3.1")
@pytest.mark.parametrize(
    ("expected", "mismatch"), [(None, False), (1, False), (0, True), (2, True)]
)
def test_another_portal_group_than_discovery_said(expected: int | None, mismatch: bool) -> None:
    """It is noticed and never fatal; the embedded target says 1."""
    left = initiator(expected_portal_group_tag=expected)
    join(left, target())
    assert left.done
    assert left.parameters.target_portal_group_tag == 1
    assert left.portal_group_tag_mismatch is mismatch
    assert not left.portal_group_tag_missing


@pytest.mark.checklist(32, "13.9")
def test_a_target_that_does_not_name_its_portal_group() -> None:
    left = initiator(expected_portal_group_tag=1)
    left.start()
    left.receive(response([("AuthMethod", "None")], nsg=1))
    left.receive(response(csg=1, nsg=3, tsih=1))
    assert left.done
    assert left.portal_group_tag_missing
    assert not left.portal_group_tag_mismatch
    assert left.parameters.target_portal_group_tag is None


@pytest.mark.checklist(32, "13.9")
def test_a_portal_group_that_is_named_late() -> None:
    left = initiator(expected_portal_group_tag=4)
    left.start()
    left.receive(response([("AuthMethod", "None")], nsg=1))
    left.receive(response([("TargetPortalGroupTag", "3")], csg=1, nsg=3, tsih=1))
    assert left.portal_group_tag_missing
    assert left.portal_group_tag_mismatch
    assert left.parameters.target_portal_group_tag == 3


@pytest.mark.checklist(32, "13.9")
def test_the_first_complete_response_counts() -> None:
    """§13.9: with the first response after C=0; pieces before it say nothing yet."""
    left = initiator()
    left.start()
    piece = response(continued=True)
    piece.data = b"AuthMethod=None\0TargetPortal"
    left.receive(piece)
    rest = response()
    rest.data = b"GroupTag=5\0"
    left.receive(rest)
    assert not left.portal_group_tag_missing


def test_discovery_has_no_portal_group_to_miss() -> None:
    left = initiator(session_type="Discovery", target_name=None)
    left.start()
    left.receive(response([("AuthMethod", "None")], nsg=1))
    assert not left.portal_group_tag_missing


@pytest.mark.parametrize(
    ("text", "tag"), [("65535", 65535), ("0x1F", 31), ("0bAAE=", 1), ("0B//8=", 65535)]
)
def test_a_tag_is_a_binary_value(text: str, tag: int) -> None:
    """§6.1: decimal, hex or base64."""
    left = initiator()
    left.start()
    left.receive(response([("TargetPortalGroupTag", text)], nsg=1))
    left.receive(response(csg=1, nsg=3, tsih=1))
    assert left.parameters.target_portal_group_tag == tag


@pytest.mark.parametrize("text", ["65536", "-1", "", "0b", "0b!", "0bAQAA", "0x", "one"])
def test_a_tag_that_is_none(text: str) -> None:
    left = initiator()
    left.start()
    with pytest.raises(ProtocolViolation, match=r"TargetPortalGroupTag=.*§13\.9"):
        left.receive(response([("TargetPortalGroupTag", text)], nsg=1))


# -- connections that join -----------------------------------------------------------------------

OFFER = Offer(
    max_connections=4,
    max_burst_length=1 << 17,
    max_recv_data_segment_length=32768,
    error_recovery_level=2,
    alias="host",
    iscsi_protocol_level=2,
    task_reporting=("ResponseFence", "RFC3720"),
)


@pytest.mark.checklist(37, "6.3.4")
def test_a_joining_connection_brings_only_its_own_keys() -> None:
    """§13: keys of use LO are for the leading connection, SessionType among them."""
    first = initiator(offer=OFFER)
    leading = target(offer=replace(OFFER, alias="disk"))
    join(first, leading)
    second = initiator(offer=OFFER, tsih=first.tsih, session=first.parameters)
    right = target(
        offer=replace(OFFER, max_recv_data_segment_length=4096),
        access=TargetAccess(alias="disk"),
        find_session=lambda login: leading.parameters,
    )
    trace = join(second, right)
    assert sorted(key for text in trace.sent for key in text) == [
        "AuthMethod",
        "DataDigest",
        "HeaderDigest",
        "InitiatorName",
        "MaxRecvDataSegmentLength",
        "TargetName",
    ]
    assert second.parameters == replace(first.parameters, max_send_data_segment_length=4096)
    assert right.parameters == replace(leading.parameters, max_recv_data_segment_length=4096)
    assert right.parameters.error_recovery_level == 2
    assert right.parameters.initiator_alias == "host"
    assert right.parameters.task_reporting == "ResponseFence"
    assert right.parameters.iscsi_protocol_level == 2


@pytest.mark.checklist(37, "11.12.6")
def test_a_session_that_does_not_exist_is_refused_before_anything_else() -> None:
    def find(login: TargetLogin) -> Parameters:
        assert (login.requested_tsih, login.initiator_name != "") == (9, True)
        raise status_error(LoginStatus.SESSION_DOES_NOT_EXIST, "no such session")

    second = initiator(tsih=9, session=Parameters())
    with pytest.raises(LoginError, match="020a") as caught:
        join(second, target(find_session=find))
    assert not caught.value.retry_may_help


def test_a_leading_connection_finds_no_session() -> None:
    def find(login: TargetLogin) -> Parameters:
        raise AssertionError(login)

    left = initiator()
    join(left, target(find_session=find))
    assert left.done
