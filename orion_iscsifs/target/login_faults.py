"""Logins that go wrong on demand: what a test scripts so that an initiator meets it.

`LoginFaults` holds the script of one target; `login_script.py` acts it out.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from orion_iscsifs.protocol.text import Pair


class LoginAct(enum.Enum):
    STATUS = enum.auto()
    """End the login with `status`; with an `address`, that is sent as TargetAddress."""
    SILENCE = enum.auto()
    """Answer nothing from here on, but stay connected."""
    CLOSE = enum.auto()
    """Close the connection instead of answering."""
    PARTIAL = enum.auto()
    """The text of an answer in `count` responses, all but the last of them with T=0."""
    SPLIT = enum.auto()
    """The text of an answer in segments of `count` bytes, joined by the C bit."""
    SKIP_AUTHENTICATION = enum.auto()
    """AuthMethod=None, whatever the initiator wants and this target is configured for."""
    REFLECT_RESPONSE = enum.auto()
    """Mutual CHAP: the initiator's own CHAP_R comes back as ours."""
    REFLECT_CHALLENGE = enum.auto()
    """The initiator's CHAP_C of an earlier login comes back as ours (RFC 7143 §9.2.1)."""
    SET = enum.auto()
    """`key`=`value` instead of the value that the target would send."""
    OMIT = enum.auto()
    """`key` is left out."""
    ADD = enum.auto()
    """`key`=`value` is sent once more than it should be; see `LoginFaults.replies`."""
    ANSWER = enum.auto()
    """The initiator's proposal of `key` is answered with `value` and has no effect here."""
    HEADER = enum.auto()
    """`fields` of the response have these values."""


class When(enum.Enum):
    """Which responses a fault may act on."""

    ANY = enum.auto()
    SECURITY = enum.auto()
    OPERATIONAL = enum.auto()
    """Behind the security stage, whether that brought authentication or not."""
    LAST = enum.auto()
    """The one that would end the login phase."""


@dataclass(slots=True, kw_only=True)
class LoginFault:
    """Acts on `logins` logins (None: for ever) after `after_logins` good ones."""

    act: LoginAct
    when: When = When.ANY
    after_responses: int = 0
    """So many responses of that kind go out first."""
    logins: int | None = 1
    after_logins: int = 0
    status: int = 0
    """Status-Class in the high byte, Status-Detail in the low one."""
    address: str = ""
    key: str = ""
    value: str = ""
    count: int = 2
    fields: Mapping[str, int | bytes] = field(default_factory=dict)

    def due(self) -> bool:
        """Count this login; True when the fault acts on it."""
        if self.after_logins > 0:
            self.after_logins -= 1
            return False
        if self.logins is not None:
            if self.logins == 0:
                return False
            self.logins -= 1
        return True


@dataclass(slots=True)
class LoginFaults:
    """The script of one target, or of all discovery logins."""

    pending: list[LoginFault] = field(default_factory=list)
    hits: int = 0
    """Faults that acted."""
    replies: list[Pair] = field(default_factory=list)
    """What initiators answered to the keys that `ADD` sent."""
    challenge: str = ""
    """The last CHAP_C that an initiator sent."""

    def add(self, fault: LoginFault) -> LoginFault:
        self.pending.append(fault)
        return fault

    def clear(self) -> None:
        self.pending.clear()

    def take(self) -> list[LoginFault]:
        """The faults of the login that begins now; spent ones are forgotten."""
        due = [fault for fault in self.pending if fault.due()]
        self.pending = [fault for fault in self.pending if fault.logins != 0]
        return due
