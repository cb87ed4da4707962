"""What can go wrong, as types.

Five families, never mixed: the user's mistake (`UsageError`), the peer's violation of a standard
(`ProtocolViolation`), a broken path (`TransportError`), a refused login (`LoginError`) and a
command that the device refused (`ScsiError`, in `orion_iscsifs.scsi.sense` its details).
Each class carries the errno that FUSE answers with and says whether a retry on the same path, or
the same request on another path, may help. `str(error)` is the one line "what: why"; `advice` is
what the user can do about it.
"""

import errno as _errno
from typing import ClassVar


class OrionError(Exception):
    """Base of every error that this project raises on purpose."""

    errno: ClassVar[int] = _errno.EIO
    retry_may_help: ClassVar[bool] = False
    other_path_may_help: ClassVar[bool] = False

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice

    @property
    def line(self) -> str:
        """The one line a user sees, without the program's name."""
        return f"{self} ({self.advice})" if self.advice else str(self)


class UsageError(OrionError):
    """The user's mistake: an option, a URL, a file of settings. Exit code 2."""

    errno = _errno.EINVAL


class MountError(OrionError):
    """The mount point, /dev/fuse or the kernel's FUSE refused. Exit code 32 from mount."""


class BusyError(OrionError):
    """The mount or the LUN is in use by somebody else."""

    errno = _errno.EBUSY


# -- the peer ------------------------------------------------------------------------------------


class ProtocolViolation(OrionError):
    """The peer broke RFC 7143. Names the PDU and the section; the connection is unusable."""

    retry_may_help = True
    other_path_may_help = True

    def __init__(self, pdu: str, problem: str, *, section: str) -> None:
        super().__init__(f"{pdu}: {problem} (RFC 7143 §{section})")
        self.pdu = pdu
        self.problem = problem
        self.section = section


class DigestError(ProtocolViolation):
    """A header or data digest does not match: bytes were damaged between the two hosts."""


class NegotiationFailed(OrionError):
    """A text negotiation ended without agreement: every parameter stays as it was (§7.12)."""


class TransportError(OrionError):
    """The TCP connection can't be made, was lost, or is silent: a path is broken."""

    retry_may_help = True
    other_path_may_help = True


class ConnectFailed(TransportError):
    """No TCP connection to the portal (refused, unreachable, name not found, timed out)."""


class NotIscsi(TransportError):
    """Something answers at the portal, but it does not speak iSCSI."""

    retry_may_help = False


class TlsError(TransportError):
    """The TLS handshake failed, or the peer ended TLS with an alert."""


class CertificateRefused(TlsError):
    """One side does not accept the other's certificate: an administrator has to mend that."""

    errno = _errno.EACCES
    retry_may_help = False


class ConnectionLost(TransportError):
    """An established connection broke, or the peer no longer answers pings."""


class ReplacementTimedOut(TransportError):
    """No path came back within `replacement_timeout`: held I/O fails with EIO."""

    retry_may_help = False
    other_path_may_help = False


# -- login ---------------------------------------------------------------------------------------


class LoginError(OrionError):
    """The target ended the login phase with a Status-Class other than 0 (RFC 7143 §11.13.5).

    `status_class` and `status_detail` are the two bytes of the Login Response, or None when this
    side refused (a negotiation that can't be accepted).
    """

    other_path_may_help = True

    def __init__(
        self,
        message: str,
        *,
        advice: str = "",
        status_class: int | None = None,
        status_detail: int | None = None,
    ) -> None:
        super().__init__(message, advice=advice)
        self.status_class = status_class
        self.status_detail = status_detail


class AuthenticationFailed(LoginError):
    """The target refused our credentials, or we refuse the target's (mutual CHAP)."""

    errno = _errno.EACCES


class TargetNotFound(LoginError):
    """The portal knows no target of this name (Status 0203)."""

    errno = _errno.ENODEV


class TargetUnavailable(LoginError):
    """The target can't serve now (Status-Class 3, or 0301/0302 in words): retry later."""

    retry_may_help = True


class LoginRedirected(LoginError):
    """Status-Class 1: log in at another address. `portal` is the TargetAddress text."""

    def __init__(self, message: str, *, portal: str, permanent: bool, status_detail: int) -> None:
        super().__init__(message, status_class=1, status_detail=status_detail)
        self.portal = portal
        self.permanent = permanent


# -- the device ----------------------------------------------------------------------------------


class DeviceError(OrionError):
    """A request that the block device can't carry out."""


class LunNotFound(DeviceError):
    """The target has no such LUN."""

    errno = _errno.ENODEV


class NotADisk(DeviceError):
    """The LUN exists but is not a direct-access block device (controller, tape, ...)."""

    errno = _errno.ENODEV


class WriteProtected(DeviceError):
    """A write to a read-only device (DATA PROTECT, or mounted `ro`)."""

    errno = _errno.EROFS


class OutOfRange(DeviceError):
    """The request reaches past the end of the device."""

    errno = _errno.ENOSPC


class Misaligned(DeviceError):
    """Offset or length is no multiple of the logical block size: the caller's bug."""

    errno = _errno.EINVAL


class ScsiError(DeviceError):
    """The device answered with a status other than GOOD that no retry mended.

    `status` is the SAM status byte, `sense_key`, `asc`, `ascq` the decoded sense (zero if none).
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        sense_key: int = 0,
        asc: int = 0,
        ascq: int = 0,
        advice: str = "",
    ) -> None:
        super().__init__(message, advice=advice)
        self.status = status
        self.sense_key = sense_key
        self.asc = asc
        self.ascq = ascq


class MediumError(ScsiError):
    """The medium is damaged at `lba` (None: the device does not say where); EIO there only."""

    lba: int | None = None


class SpaceExhausted(ScsiError):
    """A thin-provisioned device has no room for the write (27h/07h); more may be given to it."""

    errno = _errno.ENOSPC
    retry_may_help = True


class PathInaccessible(ScsiError):
    """The target port can't serve this LUN now: standby, unavailable, or changing (SPC-4 §5.15.2).

    The command was not carried out; another path, or the same one later, may do it.
    """

    retry_may_help = True
    other_path_may_help = True


class ReservationConflict(DeviceError):
    """Another initiator's reservation keeps this one from writing (SPC-4 §5.13)."""

    errno = _errno.EBUSY


class NotSupported(DeviceError):
    """The device lacks an optional operation (discard, for one)."""

    errno = _errno.EOPNOTSUPP
