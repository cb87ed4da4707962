"""One path to a target: a session with an ISID of its own."""

from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Self

from orion_iscsifs.config import SessionConfig
from orion_iscsifs.config.places import create_private, state_dir
from orion_iscsifs.custody import GROUP, custody
from orion_iscsifs.initiator.dial import Nexus, Portal
from orion_iscsifs.initiator.identity import hold_isid, session_stem
from orion_iscsifs.initiator.session import Session, open_session


def group_note(stem: str, isid: bytes) -> str:
    """The name in `custody` of the portal group that a session belongs to.

    `stem`: `session_stem` of its target.
    """
    return f"{GROUP}{stem}/{int.from_bytes(isid[-2:], 'big')}"


class SessionPath(AbstractAsyncContextManager[object]):
    """A context manager: logged in inside, as far as the network allows."""

    session: Session

    def __init__(self, target_name: str, portal: Portal, config: SessionConfig) -> None:
        self._target_name = target_name
        self._portal = portal
        self._config = config
        self._layers = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises what the first login raises, with nothing left open."""
        async with AsyncExitStack() as layers:
            # The same path has the same ISID in a worker that takes over.
            name = f"{self._portal} {self._config.bind or ''}"
            isid = layers.enter_context(
                hold_isid(create_private(state_dir()), self._target_name, name)
            )
            nexus = Nexus(target_name=self._target_name, isid=isid, config=self._config)
            self.session = await layers.enter_async_context(open_session(self._portal, nexus))
            group = self.session.parameters.target_portal_group_tag
            if group is not None:
                custody.note(group_note(session_stem(self._target_name), isid), str(group))
            self._layers = layers.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._layers.__aexit__(kind, error, traceback)
