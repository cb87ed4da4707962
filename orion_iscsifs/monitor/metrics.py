"""The status document as Prometheus text (`.orion/metrics`)."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_PREFIX: Final = "orion_iscsifs"
_LUN_GAUGES: Final = {
    "size_bytes": "capacity of the LUN",
    "dirty_bytes": "bytes that the target does not have yet",
    "oldest_dirty_age_s": "age of the oldest of them in seconds",
    "readahead_window_bytes": "how far ahead of one reader at most",
    "log.used_bytes": "of the persistent log",
    "tier.used_bytes": "of the local read cache",
}
_LUN_COUNTERS: Final = {
    "reads": "read requests",
    "writes": "write requests",
    "flushes": "flush requests",
    "errors": "failed requests",
    "cache_hits": "reads answered from the cache",
    "cache_misses": "reads that went to the target",
    "readahead_bytes": "bytes fetched ahead of readers",
    "readahead_hit_bytes": "those of them that were read",
    "readahead_waste_bytes": "those of them that nobody will read",
    "tier.hits": "reads answered from the local read cache",
    "tier.misses": "reads that it could not answer, or not whole",
    "tier.bad_records": "damaged records of it, which were read from the target",
    "tier.raw_bytes": "bytes that were put into it",
    "tier.stored_bytes": "what they take there",
}
"""Keys of a LUN in the status document; with a dot: of a part of it."""


class _StatusCollector(Collector):
    def __init__(self, mount: Mapping[str, Any]) -> None:
        self._mount = mount

    def collect(self) -> Iterator[Metric]:
        mountpoint = str(self._mount["mountpoint"])
        state = GaugeMetricFamily(
            f"{_PREFIX}_mount_state", "1 for the present state", labels=["mountpoint", "state"]
        )
        state.add_metric([mountpoint, str(self._mount["state"])], 1)
        yield state
        yield self._sessions(mountpoint)
        for key, text in _LUN_GAUGES.items():
            yield self._luns(GaugeMetricFamily, mountpoint, key, text)
        for key, text in _LUN_COUNTERS.items():
            yield self._luns(CounterMetricFamily, mountpoint, key, text)

    def _luns(
        self,
        family: type[GaugeMetricFamily] | type[CounterMetricFamily],
        mountpoint: str,
        key: str,
        text: str,
    ) -> Metric:
        name = key.removesuffix("_s") + ("_seconds" if key.endswith("_age_s") else "")
        name = name.replace(".", "_")
        metric = family(f"{_PREFIX}_lun_{name}", text, labels=["mountpoint", "lun"])
        for lun in self._mount["luns"]:
            value = _value(lun, key)
            if value is not None:
                metric.add_metric([mountpoint, str(lun["name"])], value)
        return metric

    def _sessions(self, mountpoint: str) -> Metric:
        metric = GaugeMetricFamily(
            f"{_PREFIX}_session_logged_in",
            "1 while the session is logged in",
            labels=["mountpoint", "target"],
        )
        for session in self._mount["sessions"]:
            labels = [mountpoint, str(session["target"])]
            metric.add_metric(labels, float(session["state"] == "logged-in"))
        return metric


def _value(lun: Mapping[str, Any], key: str) -> float | None:
    """None: not known, or there is no such part."""
    found: Any = lun
    for part in key.split("."):
        found = None if found is None else found.get(part)
    return None if found is None else float(found)


def prometheus_text(mount: Mapping[str, Any]) -> str:
    """`mount` is one entry of the status document."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StatusCollector(mount))
    return generate_latest(registry).decode()
