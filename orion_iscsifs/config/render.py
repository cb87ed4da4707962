"""A `MountConfig` as the TOML of `.orion/config.toml`: effective values, secrets as `***`."""

from orion_iscsifs.config.settings import (
    CacheConfig,
    ChapCredentials,
    MountConfig,
    MultipathConfig,
    TlsConfig,
)

_HIDDEN = "***"


def to_toml(config: MountConfig, source: str) -> str:
    """The words of INTERFACE §5, one a line. `source` is the redacted URL."""
    lines = [f"# effective settings of {source}".replace("\n", " ")]
    lines += [f"{word} = {_toml(value)}" for word, value in _words(config)]
    return "\n".join(lines) + "\n"


def _words(config: MountConfig) -> list[tuple[str, object]]:
    session, cache, fuse = config.session, config.cache, config.fuse
    words: list[tuple[str, object]] = [
        ("ro", fuse.read_only),
        ("allow_other", fuse.allow_other),
        *([] if fuse.uid is None else [("uid", fuse.uid)]),
        *([] if fuse.gid is None else [("gid", fuse.gid)]),
        ("mode", f"{fuse.mode:04o}"),
        ("hide_control", fuse.hide_control),
        ("initiator_name", session.initiator_name),
        *_credentials("chap", session.auth.initiator),
        *_credentials("mutual", session.auth.target),
        ("chap_algs", "+".join(_algorithm(a.name) for a in session.auth.algorithms)),
        ("header_digest", str(session.header_digest)),
        ("data_digest", str(session.data_digest)),
        ("connections", session.connections),
        ("erl", session.erl),
        *_tls(session.tls),
        *_paths(config.multipath, session.bind),
        ("reserve", str(config.reserve.mode)),
        ("preempt", config.reserve.preempt),
        ("queue_depth", "auto" if session.queue_depth is None else session.queue_depth),
        ("cache", str(cache.mode)),
        ("cache_size", cache.size_bytes),
        ("dirty_max", cache.dirty_max_bytes),
        ("dirty_age", cache.dirty_age_s),
        *_log(cache),
        *([] if cache.key_file is None else [("cache_key_file", cache.key_file)]),
        ("readahead", cache.readahead),
        ("replacement_timeout", session.replacement_timeout_s),
        ("login_timeout", session.login_timeout_s),
        ("noop_interval", session.noop_interval_s),
        ("noop_timeout", session.noop_timeout_s),
        ("command_timeout", session.command_timeout_s),
    ]
    return words


def _credentials(direction: str, credentials: ChapCredentials | None) -> list[tuple[str, object]]:
    if credentials is None:
        return []
    return [(f"{direction}_user", credentials.user), (f"{direction}_secret", _HIDDEN)]


def _tls(tls: TlsConfig | None) -> list[tuple[str, object]]:
    """Names of files: what is secret in them is not read here."""
    files = () if tls is None else (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key))
    return [(f"tls_{name}", path) for name, path in files if path is not None]


def _log(cache: CacheConfig) -> list[tuple[str, object]]:
    if cache.log_dir is None:
        return []
    words = ("log_dir", cache.log_dir), ("log_size", cache.log_bytes)
    return [*words, ("destage", str(cache.destage))]


def _paths(config: MultipathConfig, bind: str | None) -> list[tuple[str, object]]:
    words: list[tuple[str, object]] = []
    if config.portals:
        words.append(("portals", "+".join(config.portals)))
    if config.all_portals:
        words.append(("paths", "all"))
    if config.binds or bind is not None:
        words.append(("bind", "+".join(config.binds or (bind or "",))))
    if config.wanted:
        failback = "manual" if config.failback_s is None else f"{config.failback_s:g}"
        words += [("path_policy", str(config.policy)), ("failback", failback)]
    return words


def _algorithm(name: str) -> str:
    return {"SHA3_256": "sha3-256"}.get(name, name.lower())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
