"""How a session misbehaves when `faults` say so."""

from typing import TYPE_CHECKING

import trio

from orion_iscsifs.target.faults import Act, Fault
from orion_iscsifs.target.unit import Outcome

if TYPE_CHECKING:
    from orion_iscsifs.target.session import Session
    from orion_iscsifs.target.tasks import Task


def misbehave(session: "Session", task: "Task", fault: Fault) -> None:
    """Act out `fault` at the moment when `task` would begin; the rest `Session.answer` does."""
    match fault.act:
        case Act.DROP:
            session.drop()
            return
        case Act.SILENCE:
            return
        case Act.DELAY:
            session.later(_delayed, session, task, fault.delay_s)
            return
        case Act.ANSWER:
            task.failure = Outcome(fault.status, fault.sense)
        case Act.PING:
            session.ping()
        case Act.ASYNC_MESSAGE:
            session.send_async_message(fault.async_event, fault.parameters)
        case Act.CLOSE_WINDOW:
            session.freeze_window()
            if fault.delay_s:
                session.later(_thawed, session, fault.delay_s)
        case Act.DROP_AFTER | Act.TARGET_FAILURE:
            pass
        case Act.CORRUPT_HEADER_DIGEST | Act.CORRUPT_DATA_DIGEST:
            pass
    session.advance(task)


async def _delayed(session: "Session", task: "Task", delay_s: float) -> None:
    await trio.sleep(delay_s)
    session.advance(task)
    session.connection.flush()


async def _thawed(session: "Session", delay_s: float) -> None:
    await trio.sleep(delay_s)
    session.thaw_window()
