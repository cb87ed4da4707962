"""Words become a `MountConfig`: defaults filled in, contradictions refused, secrets read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, cast

from orion_iscsifs.config.secrets import length_warnings, read_key_file, read_secret_file
from orion_iscsifs.config.settings import (
    LOG_BYTES_MIN,
    AuthConfig,
    CacheConfig,
    CacheMode,
    ChapAlgorithm,
    ChapCredentials,
    Destage,
    DigestPreference,
    FuseConfig,
    MountConfig,
    MultipathConfig,
    PathPolicy,
    ReserveConfig,
    ReserveMode,
    Secret,
    SessionConfig,
    TlsConfig,
)
from orion_iscsifs.config.sources import Words
from orion_iscsifs.config.tls import client_context, key_warnings
from orion_iscsifs.config.values import MANUAL
from orion_iscsifs.errors import UsageError

T = TypeVar("T")


@dataclass(slots=True)
class _Reader:
    """Takes typed values out of the words, and collects warnings."""

    words: Words
    warnings: list[str] = field(default_factory=list)

    def get(self, name: str, default: T) -> T:
        # `words.py` made the value; each caller's default has the type that its parser returns.
        return cast("T", self.words.get(name, default))

    def text(self, name: str) -> str | None:
        return self.get(name, cast("str | None", None))


def build(
    words: Words, default_name: Callable[[], str], *, tls: bool = False
) -> tuple[MountConfig, list[str]]:
    """The settings of one mount and warnings for the user.

    `default_name` is asked for the initiator name only when no option gives one. `tls`: the source
    is `iscsis://`.
    """
    reader = _Reader(words)
    config = MountConfig(
        session=_session(reader, default_name, tls=tls),
        multipath=_multipath(reader),
        reserve=_reserve(reader),
        cache=_cache(reader),
        fuse=_fuse(reader),
    )
    return config, reader.warnings


def _session(reader: _Reader, default_name: Callable[[], str], *, tls: bool) -> SessionConfig:
    name = reader.text("initiator_name")
    if name is not None and re.fullmatch(r"(?i:iqn|eui|naa)\.\S{1,219}", name) is None:
        raise UsageError(
            f"option initiator_name={name}: is no iSCSI name",
            advice="it begins with iqn., eui. or naa.",
        )
    defaults = SessionConfig(initiator_name="")
    binds: tuple[str, ...] = reader.get("bind", ())
    return SessionConfig(
        initiator_name=name or default_name(),
        auth=_auth(reader),
        tls=_tls(reader, wanted=tls),
        header_digest=DigestPreference(reader.get("header_digest", defaults.header_digest)),
        data_digest=DigestPreference(reader.get("data_digest", defaults.data_digest)),
        bind=binds[0] if len(binds) == 1 else None,
        connections=reader.get("connections", defaults.connections),
        erl=reader.get("erl", defaults.erl),
        queue_depth=reader.get("queue_depth", defaults.queue_depth),
        replacement_timeout_s=reader.get("replacement_timeout", defaults.replacement_timeout_s),
        login_timeout_s=reader.get("login_timeout", defaults.login_timeout_s),
        noop_interval_s=reader.get("noop_interval", defaults.noop_interval_s),
        noop_timeout_s=reader.get("noop_timeout", defaults.noop_timeout_s),
        command_timeout_s=reader.get("command_timeout", defaults.command_timeout_s),
    )


def _tls(reader: _Reader, *, wanted: bool) -> TlsConfig | None:
    if wanted:
        return _tls_files(reader)
    for option in ("tls_ca", "tls_cert", "tls_key"):
        if reader.text(option) is not None:
            raise UsageError(
                f"option {option}: the source is iscsi://, which is not encrypted",
                advice=f"write iscsis:// for TLS, or leave {option}= out",
            )
    return None


def _tls_files(reader: _Reader) -> TlsConfig:
    if reader.text("tls_key") is not None and reader.text("tls_cert") is None:
        raise UsageError(
            "option tls_key: a private key without its certificate", advice="add tls_cert=FILE"
        )
    config = TlsConfig(
        ca=_absolute(reader.text("tls_ca")),
        cert=_absolute(reader.text("tls_cert")),
        key=_absolute(reader.text("tls_key")),
    )
    client_context(config)
    reader.warnings += key_warnings(config)
    return config


def _absolute(path: str | None) -> str | None:
    """The daemon leaves the current folder, and reads the file again when it was renewed."""
    return None if path is None else str(Path(path).expanduser().absolute())


def _auth(reader: _Reader) -> AuthConfig:
    initiator = _credentials(reader, "chap")
    target = _credentials(reader, "mutual")
    if target is not None:
        if initiator is None:
            raise UsageError(
                "option mutual_user: mutual CHAP needs chap_user as well",
                advice="a target proves itself only to an initiator that did so first",
            )
        if initiator.secret.reveal() == target.secret.reveal():
            raise UsageError(
                "option mutual_secret_file: both directions have the same secret",
                advice="RFC 7143 §9.2.1 demands two different ones",
            )
    default: tuple[ChapAlgorithm, ...] = (ChapAlgorithm.MD5,)
    return AuthConfig(
        initiator=initiator, target=target, algorithms=reader.get("chap_algs", default)
    )


def _credentials(reader: _Reader, direction: str) -> ChapCredentials | None:
    user = reader.text(f"{direction}_user")
    secret = _secret(reader, direction)
    if user is None and secret is None:
        return None
    if user is None:
        raise UsageError(
            f"option {direction}_user: missing, but there is a secret",
            advice=f"add {direction}_user=NAME",
        )
    if secret is None:
        raise UsageError(
            f"option {direction}_user={user}: the secret is missing",
            advice=f"add {direction}_secret_file=FILE",
        )
    return ChapCredentials(user=user, secret=secret)


def _secret(reader: _Reader, direction: str) -> Secret | None:
    path = reader.text(f"{direction}_secret_file")
    plain = reader.text(f"{direction}_secret")
    if path is not None:
        option = f"{direction}_secret_file"
        secret, warnings = read_secret_file(option, Path(path).expanduser())
    elif plain is not None:
        option, secret = f"{direction}_secret", Secret(plain)
        warnings = [
            f"a secret in a URL or an option can be seen by others: use {direction}_secret_file="
        ]
    else:
        return None
    reader.warnings += warnings + length_warnings(option, secret)
    return secret


def _multipath(reader: _Reader) -> MultipathConfig:
    defaults = MultipathConfig()
    failback: float | str = reader.get("failback", 0.0)
    config = MultipathConfig(
        portals=reader.get("portals", defaults.portals),
        all_portals=reader.text("paths") is not None,
        binds=reader.get("bind", defaults.binds),
        policy=PathPolicy(reader.get("path_policy", defaults.policy)),
        failback_s=None if failback == MANUAL else float(failback),
    )
    if config.portals and config.all_portals:
        raise UsageError(
            "option portals: paths=all takes every portal that discovery names",
            advice="give one of the two",
        )
    return config


def _reserve(reader: _Reader) -> ReserveConfig:
    defaults = ReserveConfig()
    config = ReserveConfig(
        mode=ReserveMode(reader.get("reserve", defaults.mode)),
        preempt=reader.get("preempt", defaults.preempt),
    )
    if config.preempt and (config.mode is ReserveMode.OFF or reader.get("ro", False)):
        other = "ro: a read-only mount" if reader.get("ro", False) else "reserve=off:"
        raise UsageError(
            f"option preempt: {other} takes no reservation", advice="leave one of the two out"
        )
    return config


def _cache(reader: _Reader) -> CacheConfig:
    defaults = CacheConfig()
    size = reader.get("cache_size", defaults.size_bytes)
    dirty_max = reader.get("dirty_max", size // 2)
    if dirty_max > size:
        raise UsageError(
            f"option dirty_max={dirty_max}: is more than cache_size ({size})",
            advice="dirty data lives in the cache: raise cache_size or lower dirty_max",
        )
    readahead: Literal["auto", "off"] | int = reader.get("readahead", defaults.readahead)
    mode = CacheMode(reader.get("cache", defaults.mode))
    return CacheConfig(
        mode=mode,
        size_bytes=size,
        dirty_max_bytes=dirty_max,
        dirty_age_s=reader.get("dirty_age", defaults.dirty_age_s),
        readahead=readahead,
        log_dir=_log_dir(reader, mode),
        log_bytes=_log_bytes(reader),
        destage=Destage(reader.get("destage", defaults.destage)),
        key_file=_absolute(reader.text("cache_key_file")),
        key=_cache_key(reader),
    )


def _log_dir(reader: _Reader, mode: CacheMode) -> str | None:
    folder = _absolute(reader.text("log_dir"))
    if mode is CacheMode.LOG and folder is None:
        raise UsageError(
            "option cache=log: where is the log to be?",
            advice="add log_dir=DIR, a folder on a local disk",
        )
    return folder


def _cache_key(reader: _Reader) -> Secret | None:
    path = _absolute(reader.text("cache_key_file"))
    if path is None:
        return None
    key, warnings = read_key_file("cache_key_file", Path(path))
    reader.warnings += warnings
    return key


def _log_bytes(reader: _Reader) -> int:
    size = reader.get("log_size", CacheConfig().log_bytes)
    if size < LOG_BYTES_MIN:
        raise UsageError(
            f"option log_size={size}: is less than {LOG_BYTES_MIN}", advice="a log needs 16M"
        )
    return size


def _fuse(reader: _Reader) -> FuseConfig:
    defaults = FuseConfig()
    return FuseConfig(
        read_only=reader.get("ro", defaults.read_only),
        allow_other=reader.get("allow_other", defaults.allow_other),
        uid=reader.get("uid", defaults.uid),
        gid=reader.get("gid", defaults.gid),
        mode=reader.get("mode", defaults.mode),
        hide_control=reader.get("hide_control", defaults.hide_control),
    )
