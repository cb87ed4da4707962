"""The virtual files of `.orion/`, from callables of whoever knows the content."""

from collections.abc import Callable, Mapping
from typing import Final

STATUS: Final = "status.json"
METRICS: Final = "metrics"
CONFIG: Final = "config.toml"


def control_files(
    *, status: Callable[[], str], metrics: Callable[[], str], config: str
) -> Mapping[str, Callable[[], bytes]]:
    """Name → content. Each content is made when the file is opened or its size is asked for."""
    return {
        STATUS: lambda: status().encode(),
        METRICS: lambda: metrics().encode(),
        CONFIG: lambda: config.encode(),
    }
