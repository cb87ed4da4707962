"""Ending a nexus from elsewhere, when the path to it is gone.

A session whose connections are lost may live on at the target, with a write of ours in some buffer
that is carried out much later. The target has to end that session before the write may go another
way. A login with the session's own ISID and TSIH 0 makes it do so before it answers (session
reinstatement, RFC 7143 §6.3.5), through any portal of the same portal group: initiator port (name
and ISID) and target portal group are what a session belongs to (§4.4.4). In another group the same
ISID is another nexus, and a login there proves nothing.
"""

import logging

import trio

from orion_iscsifs.errors import OrionError
from orion_iscsifs.initiator.dial import LoggedIn, Nexus, Portal, dial
from orion_iscsifs.protocol.framing import encode
from orion_iscsifs.protocol.pdu import LogoutRequest

log = logging.getLogger(__name__)

_FIRST_CMD_SN = 1
_LOGOUT_TIMEOUT_S = 2.0


async def end_nexus(portal: Portal, nexus: Nexus, group_tag: int | None) -> bool:
    """Make the target end the session of `nexus` in the portal group `group_tag`, via `portal`.

    True: whatever that session had in flight can't land any more. False: `portal` is in another
    portal group, or one of the two groups is not known, and so nothing is proven.
    Raises what `dial` raises.
    """
    if group_tag is None:
        return False
    logged_in = await dial(portal, nexus, cmd_sn=_FIRST_CMD_SN)
    ended = logged_in.parameters.target_portal_group_tag == group_tag
    if not ended:
        log.info("%s: not in portal group %d: it can't end the lost session", portal, group_tag)
    await _log_out(logged_in)
    return ended


async def _log_out(logged_in: LoggedIn) -> None:
    """In order if the target answers soon; it ends a session without connections by itself."""
    request = LogoutRequest(0, cmd_sn=logged_in.cmd_sn)
    request.exp_stat_sn = logged_in.exp_stat_sn
    parameters = logged_in.parameters
    try:
        with trio.move_on_after(_LOGOUT_TIMEOUT_S):
            await logged_in.wire.send(
                encode(
                    request,
                    header_digest=parameters.header_digest,
                    data_digest=parameters.data_digest,
                )
            )
            await logged_in.wire.receive()
    except OrionError as error:
        log.info("%s: the logout is not answered: %s", logged_in.portal, error)
    finally:
        logged_in.wire.close()
