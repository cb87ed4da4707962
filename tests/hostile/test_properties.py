"""Every property under Hypothesis: always the same examples, so that a failure is one for all."""

import logging
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.properties import PROPERTIES
from tests.hostile.seeds import SEEDS

_MARKS = {
    "text": pytest.mark.checklist(27, "6.1"),
    "sense_data": pytest.mark.checklist(24, "11.4.7"),
    "initiator_login": pytest.mark.checklist(41, "12.1.3"),
}
_EXAMPLES = 500
_MUTATIONS = 2500


@pytest.fixture(autouse=True, scope="module")
def _silence() -> Iterator[None]:
    """What a hostile peer makes us log is no news here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_MARKS.get(name, ())) for name in PROPERTIES]
)
def test_arbitrary_bytes(name: str) -> None:
    check = PROPERTIES[name]

    @settings(max_examples=_EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.binary(max_size=1000))
    def run(data: bytes) -> None:
        check(data)

    run()


@pytest.mark.parametrize("name", PROPERTIES)
def test_seeds_and_what_is_close_to_them(name: str) -> None:
    """The seeds get somewhere; a few changed bytes break them at every step of the way."""
    check, dice = PROPERTIES[name], random.Random(name)
    assert SEEDS[name]
    for seed in SEEDS[name]:
        check(seed)
    for _ in range(_MUTATIONS):
        check(_mutated(dice, dice.choice(SEEDS[name])))


def _mutated(dice: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(dice.randint(1, 4)):
        position = dice.randrange(len(data) + 1)
        match dice.randrange(4):
            case 0:
                data[position : position + 1] = dice.randbytes(1)
            case 1:
                data[position:position] = dice.randbytes(dice.randrange(1, 9))
            case 2:
                del data[position : position + dice.randrange(1, 9)]
            case 3:
                data[position:position] = data[: dice.randrange(64)]
    return bytes(data)
