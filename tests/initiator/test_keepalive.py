"""When a silent target is pinged and when it is given up."""

from orion_iscsifs.initiator.keepalive import Action, Keepalive


def test_a_talking_target_is_never_pinged() -> None:
    keepalive = Keepalive(5, 5, last_received=100)
    for now in range(101, 200, 4):
        assert keepalive.check(now) is Action.WAIT
        keepalive.last_received = now


def test_a_zero_in_either_time_turns_it_off() -> None:
    for keepalive in (Keepalive(0, 5, 100), Keepalive(5, 0, 100)):
        assert keepalive.check(1000) is Action.WAIT
        assert keepalive.deadline == float("inf")


def test_silence_is_pinged_once_and_then_dropped() -> None:
    keepalive = Keepalive(5, 3, last_received=100)
    assert keepalive.deadline == 105
    assert keepalive.check(104.9) is Action.WAIT
    assert keepalive.check(105) is Action.SEND_PING
    assert keepalive.deadline == 108
    assert keepalive.check(107.9) is Action.WAIT
    assert keepalive.check(108) is Action.DROP_CONNECTION


def test_anything_received_proves_the_target_alive() -> None:
    """A target under load may answer the ping late; its data is proof enough."""
    keepalive = Keepalive(5, 3, last_received=100)
    assert keepalive.check(105) is Action.SEND_PING
    keepalive.last_received = 107
    assert keepalive.check(109) is Action.WAIT
    assert keepalive.deadline == 112
    assert keepalive.check(112) is Action.SEND_PING


def test_an_interval_of_zero_turns_it_off() -> None:
    assert Keepalive(0, 5, last_received=0).check(1e9) is Action.WAIT
