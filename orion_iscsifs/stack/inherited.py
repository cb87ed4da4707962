"""Sessions of a dead worker of this mount, and how they are ended although their path is down.

As a rule a path logs in again and that ends its earlier session. A path that is down can't; then
its session is ended through another one, as for a path that is lost in mid-use (`initiator.fence`).
Until that is proven a write of the dead worker may still land, so nothing may be answered.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from orion_iscsifs.custody import ISID, Custody
from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.fence import end_nexus
from orion_iscsifs.initiator.identity import session_stem
from orion_iscsifs.initiator.outage import State
from orion_iscsifs.initiator.session import Session
from orion_iscsifs.stack.path import group_note

log = logging.getLogger(__name__)


class EarlierSessions:
    """Of the worker that this one takes over from."""

    def __init__(self, custody: Custody) -> None:
        self._custody = custody
        self._ended: set[str] = set()

    def living(self, sessions: Sequence[Session]) -> list[str]:
        """The names in `custody` of those that are not proven to have ended."""
        again = {
            (_stem_of(session), int.from_bytes(session.nexus.isid[-2:], "big"))
            for session in sessions
        }
        return [
            name
            for name in self._custody.heirlooms(ISID)
            if name not in self._ended and _session_of(name) not in again
        ]

    async def end(self, sessions: Sequence[Session]) -> None:
        """Those that can be ended through one of `sessions`. What fails is logged."""
        for name in self.living(sessions):
            lock = self._custody.inherit(name)
            if lock is None:
                continue  # its own path is logging in just now
            try:
                if await self._end_through(sessions, name):
                    log.info(
                        "the earlier session of path %s is ended through another", path_of(name)
                    )
                    self._ended.add(name)
            except OrionError as error:
                log.info("the earlier session of path %s: %s", path_of(name), error)
            finally:
                self._custody.release(name, lock)

    async def _end_through(self, sessions: Sequence[Session], name: str) -> bool:
        stem, qualifier = _session_of(name)
        for session in sessions:
            nexus = session.nexus
            if _stem_of(session) != stem or session.state is not State.LOGGED_IN:
                continue
            isid = nexus.isid[:-2] + qualifier.to_bytes(2, "big")
            group = self._custody.noted(group_note(stem, isid))
            if group is not None and session.parameters.target_portal_group_tag == int(group):
                return await end_nexus(session.portal, replace(nexus, isid=isid), int(group))
        return False


def path_of(name: str) -> str:
    """The path in the words of the log."""
    return name.split("/", 3)[3].strip()


def _stem_of(session: Session) -> str:
    assert session.nexus.target_name is not None, "a session with a target, not for discovery"
    return session_stem(session.nexus.target_name)


def _session_of(name: str) -> tuple[str, int]:
    _, stem, qualifier, _ = name.split("/", 3)
    return stem, int(qualifier)
