"""Options, TOML and URL words: one vocabulary, later wins, nothing accepted and ignored."""

import os
import stat
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_iscsifs.config import (
    CacheMode,
    ChapAlgorithm,
    ChapCredentials,
    DigestPreference,
    MountConfig,
    MultipathConfig,
    PathPolicy,
    ReserveConfig,
    ReserveMode,
    Secret,
    SessionConfig,
)
from orion_iscsifs.config.build import build
from orion_iscsifs.config.places import create_private, runtime_dir, state_dir
from orion_iscsifs.config.render import to_toml
from orion_iscsifs.config.sources import (
    default_files,
    gather,
    parse_options,
    parse_query,
    parse_toml,
)
from orion_iscsifs.config.values import size_bytes
from orion_iscsifs.config.words import LATER, OPTIONS
from orion_iscsifs.errors import MountError, UsageError

NOWHERE = {"HOME": "/nonexistent"}


def configured(*options: str) -> MountConfig:
    return warned(*options)[0]


def warned(*options: str) -> tuple[MountConfig, list[str]]:
    return build(gather(options, {}, NOWHERE), lambda: "iqn.2024-01.org.example:me")


def secret_file(folder: Path, secret: str = "twelve-bytes-long", name: str = "secret") -> Path:
    path = folder / name
    path.write_text(secret + "\nsecond line\n")
    path.chmod(0o600)
    return path


def test_defaults_are_those_of_the_interface() -> None:
    config = configured()
    assert config == MountConfig(session=SessionConfig(initiator_name="iqn.2024-01.org.example:me"))
    assert config.cache.mode is CacheMode.WRITEBACK
    assert config.cache.size_bytes == 256 << 20
    assert config.cache.dirty_max_bytes == 128 << 20
    assert config.fuse.mode == 0o600


def test_every_implemented_option(tmp_path: Path) -> None:
    mutual = secret_file(tmp_path, "another-secret-entirely", "mutual")
    config = configured(
        "ro,allow_other,uid=12,gid=34,mode=0640,hide_control,initiator_name=iqn.x.y:z",
        f"chap_user=u,chap_secret_file={secret_file(tmp_path)}",
        f"mutual_user=m,mutual_secret_file={mutual},chap_algs=sha3-256+sha256+sha1+md5",
        "header_digest=crc32c,data_digest=none,connections=16,erl=2,queue_depth=64",
        "cache=writethrough,cache_size=1G,dirty_max=1M,dirty_age=0.5,readahead=2M",
        "portals=h:1+[fd00::1]:2+other,bind=eth0+10.0.0.2,path_policy=round-robin,failback=manual",
        "reserve=require,replacement_timeout=-1,login_timeout=1,noop_interval=0,noop_timeout=3,command_timeout=4",
    )
    fuse, session, cache = config.fuse, config.session, config.cache
    assert (fuse.read_only, fuse.allow_other, fuse.uid, fuse.gid) == (True, True, 12, 34)
    assert (fuse.mode, fuse.hide_control) == (0o640, True)
    assert session.initiator_name == "iqn.x.y:z"
    assert config.multipath == MultipathConfig(
        portals=("h:1", "[fd00::1]:2", "other"),
        binds=("eth0", "10.0.0.2"),
        policy=PathPolicy.ROUND_ROBIN,
        failback_s=None,
    )
    assert config.multipath.wanted
    assert session.bind is None, "each of several makes a path of its own"
    assert config.reserve == ReserveConfig(mode=ReserveMode.REQUIRE)
    assert session.auth.initiator == ChapCredentials(user="u", secret=Secret("twelve-bytes-long"))
    assert session.auth.target is not None
    assert session.auth.target.secret.reveal() == "another-secret-entirely"
    assert session.auth.algorithms == (
        ChapAlgorithm.SHA3_256,
        ChapAlgorithm.SHA256,
        ChapAlgorithm.SHA1,
        ChapAlgorithm.MD5,
    )
    assert session.header_digest is DigestPreference.CRC32C
    assert session.data_digest is DigestPreference.NONE
    assert (session.connections, session.erl, session.queue_depth) == (16, 2, 64)
    assert (cache.mode, cache.size_bytes, cache.dirty_max_bytes) == (
        CacheMode.WRITETHROUGH,
        1 << 30,
        1 << 20,
    )
    assert (cache.dirty_age_s, cache.readahead) == (0.5, 2 << 20)
    assert (session.replacement_timeout_s, session.login_timeout_s) == (-1, 1)
    assert (session.noop_interval_s, session.noop_timeout_s, session.command_timeout_s) == (0, 3, 4)


def test_generic_options_are_ignored_and_later_ones_win() -> None:
    config = configured(
        "defaults,_netdev,nofail,noauto,user,x-systemd.automount,dev,suid,noatime",
        "ro,cache=none,,",
        "rw,cache=writeback,comment=anything",
    )
    assert not config.fuse.read_only
    assert config.cache.mode is CacheMode.WRITEBACK
    assert configured("rw,ro").fuse.read_only


def test_paths_and_reservations() -> None:
    assert not configured().multipath.wanted
    one = configured("bind=10.0.0.2")
    assert (one.session.bind, one.multipath.wanted) == ("10.0.0.2", False)
    assert configured("paths=all,failback=7.5").multipath == MultipathConfig(
        all_portals=True, failback_s=7.5
    )
    assert configured("failback=immediate").multipath.failback_s == 0
    assert configured("preempt").reserve == ReserveConfig(preempt=True)


def test_dirty_max_follows_cache_size() -> None:
    assert configured("cache_size=64M").cache.dirty_max_bytes == 32 << 20
    with pytest.raises(UsageError, match="more than cache_size"):
        configured("cache_size=1M,dirty_max=2M")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("cahce=none", "unknown option (did you mean cache?)"),
        ("chap_usr=x", "did you mean chap_user?"),
        ("quux_frobnicate", "unknown option"),
        ("remount", "unknown option"),
        ("sync", "unknown option"),
        ("ro=maybe", "takes no value"),
        ("cache", "option cache: is unknown"),
        ("cache=log", "add log_dir=DIR"),
        ("cache=log,log_dir=/x,log_size=1M", "a log needs 16M"),
        ("tier_size=1G", "add tier_dir=DIR"),
        ("tier_dir=/x,tier_size=1M", "a tier needs 64M"),
        ("tier_dir=/x,tier_level=20", "neither adaptive nor a level from 0 to 19"),
        ("tier_dir=/x,tier_level=fast", "neither adaptive nor a level from 0 to 19"),
        ("tier_dir=/x,tier_reuse=maybe", "is unknown: reservation, always, never"),
        ("audit_log=/x", "not in this version"),
        ("cache=WRITEBACK", "is unknown"),
        ("cache_size=", "is no size"),
        ("cache_size=12Q", "is no size"),
        ("cache_size=-1M", "is no size"),
        ("cache_size=0", "out of range"),
        ("cache_size=99999999T", "out of range"),
        ("connections=0", "is no number from 1 to 16"),
        ("connections=17", "is no number from 1 to 16"),
        ("connections=many", "is no number from 1 to 16"),
        ("connections=-1", "is no number from 1 to 16"),
        ("erl=3", "is no number from 0 to 2"),
        ("erl=", "is no number from 0 to 2"),
        ("tls_ca=/x", "not encrypted (write iscsis:// for TLS"),
        ("tls_cert=/x", "not encrypted (write iscsis:// for TLS"),
        ("tls_key=/x", "not encrypted (write iscsis:// for TLS"),
        ("header_digest=md5", "is unknown: crc32c"),
        ("chap_algs=md4", "is unknown"),
        ("chap_algs=", "is unknown"),
        ("portals=", "is no list of portals"),
        ("portals=a++b", "is no list of portals"),
        ("portals=a:1+iscsi://b", "names iscsi://b, which is no host[:port]"),
        ("portals=fd00::1", "which is no host[:port]"),
        ("portals=" + "+".join(f"h{n}" for n in range(17)), "more than 16 portals"),
        ("portals=a,paths=all", "give one of the two"),
        ("paths=some", "is unknown: all"),
        ("bind=", "is no list of addresses"),
        ("path_policy=random", "is unknown: service-time"),
        ("failback=never", "is no number of seconds"),
        ("reserve=yes", "is unknown: auto"),
        ("preempt,reserve=off", "takes no reservation"),
        ("preempt,ro", "takes no reservation"),
        ("queue_depth=0", "neither auto"),
        ("queue_depth=many", "neither auto"),
        ("mode=999", "no file mode"),
        ("mode=17777", "no file mode"),
        ("uid=root", "no numeric id"),
        ("uid=99999999999", "no numeric id"),
        ("dirty_age=0", "more than 0"),
        ("dirty_age=soon", "no number of seconds"),
        ("dirty_age=nan", "no number of seconds"),
        ("replacement_timeout=-2", "-1 for ever"),
        ("readahead=maybe", "is no size"),
        ("initiator_name=me", "no iSCSI name"),
        ("chap_user=u", "the secret is missing"),
        ("chap_secret=s", "there is a secret"),
        ("mutual_user=u,mutual_secret=s", "needs chap_user"),
        ("chap_user=a,chap_secret=s,mutual_user=b,mutual_secret=s", "the same secret"),
        ("chap_user=u,chap_secret_file=/nonexistent", "No such file"),
        ("config=/nonexistent", "can't be read"),
    ],
)
def test_refuses(option: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        configured(option)
    assert message in caught.value.line
    assert "\n" not in caught.value.line


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_comes_later_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(UsageError, match="not in this version"):
        configured(f"{name}=x")


def test_no_word_is_both_here_and_later() -> None:
    assert not OPTIONS.keys() & LATER.keys()


def test_toml_then_url_then_options(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('cache = "none"\ncache_size = "64M"\nerl = 0\nro = true\ndirty_age = 1.5\n')
    words = gather([f"config={path},rw"], parse_query({"cache": "writethrough"}), NOWHERE)
    config, _ = build(words, lambda: "iqn.a.b:c")
    assert config.cache.mode is CacheMode.WRITETHROUGH
    assert config.cache.size_bytes == 64 << 20
    assert config.cache.dirty_age_s == 1.5
    assert not config.fuse.read_only


def test_a_later_secret_replaces_an_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('chap_user = "u"\nchap_secret_file = "/nonexistent"\n')
    words = gather([f"config={path}"], parse_query({"chap_secret": "from-the-url"}), NOWHERE)
    config, _ = build(words, lambda: "iqn.a.b:c")
    assert config.session.auth.initiator is not None
    assert config.session.auth.initiator.secret.reveal() == "from-the-url"


def test_the_users_file_comes_after_the_systems(tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    system, user = default_files(environment)
    assert system == Path("/etc/orion-iscsifs/config.toml")
    assert user == tmp_path / "orion-iscsifs" / "config.toml"
    user.parent.mkdir()
    user.write_text('cache = "none"\n')
    assert gather([], {}, environment)["cache"] == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cache = ", "no valid TOML"),
        ("[cache]\nsize=1", "no sections"),
        ("cach = 'none'", "did you mean cache?"),
        ("config = 'x'", "can't name another file"),
        ("mode = true", "no file mode"),
    ],
)
def test_bad_toml(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        parse_toml(path)
    assert message in caught.value.line
    assert str(path) in caught.value.line


def test_a_url_cant_name_a_file_of_settings() -> None:
    with pytest.raises(UsageError, match="can't be in a URL"):
        parse_query({"config": "/etc/passwd"})


def test_libiscsis_words_for_mutual_chap() -> None:
    assert parse_query({"target_user": "u", "target_password": "p"}) == {
        "mutual_user": "u",
        "mutual_secret": "p",
    }


def test_rendered_settings_read_back_as_the_same(tmp_path: Path) -> None:
    config = configured(
        "mode=0644,uid=1,cache=none,connections=2,erl=1,queue_depth=3,dirty_age=2.5,readahead=off,ro",
        "portals=a:1+b,bind=eth0+eth1,path_policy=failover,failback=30,reserve=off",
    )
    path = tmp_path / "effective.toml"
    path.write_text(to_toml(config, "iscsi://h/"))
    again, _ = build(gather([f"config={path}"], {}, NOWHERE), lambda: "unused")
    assert again == config
    assert tomllib.loads(path.read_text())["cache"] == "none"


@given(st.integers(min_value=1, max_value=1 << 40))
def test_sizes(number: int) -> None:
    assert size_bytes(str(number)) == number
    if number <= 1024:
        for shift, suffix in ((10, "K"), (20, "m"), (30, "G"), (40, "t")):
            assert size_bytes(f"{number}{suffix}") == number << shift


@given(st.text(max_size=40))
def test_any_option_text_is_understood_or_a_usage_error(text: str) -> None:
    try:
        parse_options([text])
    except UsageError as error:
        assert "\n" not in error.line  # noqa: PT017 (either outcome is right)


def test_places(tmp_path: Path) -> None:
    assert state_dir({}, uid=0) == Path("/var/lib/orion-iscsifs")
    assert runtime_dir({}, uid=0) == Path("/run/orion-iscsifs")
    assert state_dir({"XDG_STATE_HOME": "/s"}, uid=7) == Path("/s/orion-iscsifs")
    assert runtime_dir({"XDG_RUNTIME_DIR": "/r"}, uid=7) == Path("/r/orion-iscsifs")
    assert runtime_dir({}, uid=7).name == "orion-iscsifs-7"
    override = {"ORION_ISCSIFS_STATE": "/a", "ORION_ISCSIFS_RUNTIME": "/b"}
    assert (state_dir(override), runtime_dir(override)) == (Path("/a"), Path("/b"))
    made = create_private(tmp_path / "x" / "y")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(MountError, match="another user"):
        create_private(tmp_path)
