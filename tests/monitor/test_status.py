"""The status document: every key of INTERFACE §7, unknown numbers null."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orion_iscsifs.monitor.metrics import prometheus_text
from orion_iscsifs.monitor.status import (
    LUN_KEYS,
    SESSION_KEYS,
    Status,
    dirty_bytes,
    document,
    mount_status,
)


def status(*states: str, state: str | None = None) -> Status:
    return mount_status(
        mountpoint='/mnt/"quoted"',
        source="iscsi://h/",
        pid=1,
        state=state,
        stack={
            "luns": [
                {"name": "lun0", "dirty_bytes": 5, "reads": 7, "oldest_dirty_age_s": 1.5}
                | {"readahead_bytes": 100, "readahead_hit_bytes": 60, "readahead_waste_bytes": 8},
                {"name": "lun1", "dirty_bytes": None},
            ],
            "sessions": [{"target": "iqn.a.b:c", "state": state} for state in states],
        },
    )


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((), "ok"),
        (("logged-in",), "ok"),
        (("logged-in", "recovering"), "degraded"),
        (("logged-in", "failed"), "degraded"),
        (("recovering", "failed"), "recovering"),
        (("failed", "failed"), "failed"),
        (("never heard of",), "recovering"),
    ],
)
def test_state(states: tuple[str, ...], expected: str) -> None:
    assert status(*states)["state"] == expected
    assert status(*states, state="unmounting")["state"] == "unmounting"


def test_keys() -> None:
    made = document([status("logged-in")])
    assert made["version"] == 1
    mount = made["mounts"][0]
    assert set(LUN_KEYS) <= mount["luns"][1].keys()
    assert mount["luns"][1]["cache_hits"] is None
    assert set(SESSION_KEYS) <= mount["sessions"][0].keys()
    assert mount["paths"] == []
    assert dirty_bytes(mount) == 5


def test_metrics_are_prometheus_text_without_made_up_numbers() -> None:
    families = {
        family.name: family.samples
        for family in text_string_to_metric_families(prometheus_text(status("failed")))
    }
    dirty = families["orion_iscsifs_lun_dirty_bytes"]
    assert [(s.labels["lun"], s.value) for s in dirty] == [("lun0", 5)]
    assert dirty[0].labels["mountpoint"] == '/mnt/"quoted"'
    assert families["orion_iscsifs_lun_reads"][0].value == 7
    assert families["orion_iscsifs_lun_oldest_dirty_age_seconds"][0].value == 1.5
    readahead = {
        what: families[f"orion_iscsifs_lun_readahead_{what}"][0].value
        for what in ("bytes", "hit_bytes", "waste_bytes")
    }
    assert readahead == {"bytes": 100, "hit_bytes": 60, "waste_bytes": 8}
    assert families["orion_iscsifs_session_logged_in"][0].value == 0
    assert families["orion_iscsifs_lun_cache_hits"] == []
