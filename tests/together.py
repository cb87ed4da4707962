"""Which tests run one after the other in one process, when several processes run the rest.

By their names: what distributes them has not seen the tests themselves.
"""

import re
from typing import Final

WHOLE_FILES: Final = (
    "tests/interop/test_mount_helpers.py",  # they replace the helpers in /sbin
    "tests/interop/test_secrets.py",  # tgtadm gets a secret as a word, which the others look for
)
LIBISCSI: Final = "tests/interop/test_libiscsi_suite.py"
_LUN: Final = re.compile(r"::test_family\[(512e|4096)-")


def group_of(test: str) -> str:
    """The name of a group; most tests are one of their own."""
    path = test.partition("::")[0]
    if path in WHOLE_FILES:
        return path
    if path == LIBISCSI:
        # One run of iscsi-test-cu has the verdicts of every test of a LUN.
        lun = _LUN.search(test)
        return f"{path} {lun[1] if lun else 512}"
    return test
