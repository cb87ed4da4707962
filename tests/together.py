"""Which tests run one after the other in one process, when several processes run the rest.

By their names: what distributes them has not seen the tests themselves.
"""

from typing import Final

WHOLE_FILES: Final = (
    "tests/interop/test_libiscsi_suite.py",  # a run of iscsi-test-cu has the verdicts of many tests
    "tests/interop/test_mount_helpers.py",  # they replace the helpers in /sbin
    "tests/interop/test_secrets.py",  # tgtadm gets a secret as a word, which the others look for
)


def group_of(test: str) -> str:
    """The name of a group; most tests are one of their own."""
    path = test.partition("::")[0]
    return path if path in WHOLE_FILES else test
