"""What can be wrong with an encrypted LUN."""

import errno as _errno

from orion_iscsifs.errors import DeviceError


class LuksError(DeviceError):
    """The LUKS header is missing, damaged, or asks for something that is not known here."""

    errno = _errno.EINVAL


class NoLuksHeader(LuksError):
    """Nothing on the device says that it is a LUKS volume."""


class WrongPassphrase(LuksError):
    """No key slot opens with it."""

    errno = _errno.EACCES
