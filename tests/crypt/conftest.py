"""Opening a volume costs nothing here, as far as we decide."""

import pytest

from orion_iscsifs.crypt import manage


@pytest.fixture(autouse=True, scope="session")
def _cheap_digests() -> None:
    manage.DIGEST_ITERATIONS = 1000  # type: ignore[misc]  # final for everybody else
