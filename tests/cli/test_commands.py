"""What needs no mount: who is called how, errors in one line, exit codes."""

import json
import re
from pathlib import Path

import pytest

from orion_iscsifs.cli import install_helpers as helpers_module
from orion_iscsifs.cli.main import run
from orion_iscsifs.cli.report import describe
from orion_iscsifs.config.words import OPTIONS, SECRET_WORDS
from orion_iscsifs.errors import ConnectFailed, UsageError
from tests.cli.conftest import URL, Command


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("ORION_ISCSIFS_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("orion_iscsifs.cli.mount.hide_arguments", lambda _title: None)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["mount"], 2, "mount: missing argument 'SOURCE'"),
        (["mount", URL], 2, "missing argument 'MOUNTPOINT'"),
        (["frobnicate"], 2, "no such command 'frobnicate'"),
        (["mont", URL, "/x"], 2, "no such command 'mont' (did you mean mount?)"),
        (["mount", URL, "/x", "--cache=none"], 2, "no such option '--cache' (write -o cache=…)"),
        (["status", "--jsn"], 2, "no such option '--jsn' (did you mean --json?)"),
        (["doctor", URL], 2, "no such command 'doctor'"),
        (["--frobnicate"], 2, "no such option"),
        (["umount", "--timeout", "soon", "/x"], 2, "'soon' is not a valid float"),
        (["mount", "host/iqn", "/x"], 2, "this is not a URL"),
        (["host/iqn", "/x"], 2, "this is not a URL"),
        (["mount", URL, "/x", "-o", "cahce=none"], 2, "did you mean cache?"),
        (["mount", URL + "?audit_log=/x", "/x"], 2, "not in this version"),
        ([URL, "/x", "-o", "chap_user=u"], 2, "the secret is missing"),
        (["mount", URL, "/nonexistent/mnt"], 32, "does not exist (mkdir /nonexistent/mnt)"),
        (["mount", URL, "/etc/passwd"], 32, "is not a directory"),
        (["umount", "/nonexistent"], 1, "no mount of orion-iscsifs"),
        (["flush", "/nonexistent"], 1, "no running mount there"),
        (["status", "/nonexistent"], 1, "no mount there"),
        (["discover", "iscsi://h/iqn.a.b:c"], 2, "a portal has no target name"),
        (["discover", "h:port"], 2, "is no port"),
    ],
)
def test_what_a_user_might_get_wrong(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("orion-iscsifs", words) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("orion-iscsifs: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "words", "code", "message"),
    [
        ("mount.fuse.orion-iscsifs", [URL], 1, "SOURCE and MOUNTPOINT"),
        ("mount.orion-iscsifs", [URL, "/nonexistent", "-o", "rw,_netdev"], 32, "does not exist"),
        ("mount.orion-iscsifs", [URL, "/x", "-o", "quux"], 1, "unknown option"),
        ("mount.orion-iscsifs", ["-Q"], 1, "option -Q not recognized"),
        ("umount.fuse.orion-iscsifs", [], 1, "MOUNTPOINT is needed"),
        ("umount.fuse.orion-iscsifs", ["/nonexistent", "-n"], 32, "no mount of"),
    ],
)
def test_helpers_have_mount8s_codes(
    program: str, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(program, words) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_fake_mount_mounts_nothing() -> None:
    assert run("mount.orion-iscsifs", [URL, "/nonexistent", "-f", "-o", "rw"]) == 0


def test_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orion-iscsifs", ["mount", "nonsense", "/x"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run("orion-iscsifs", ["mount", "nonsense", "/x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    run("orion-iscsifs", ["--version"])


def test_secrets_of_a_mistyped_command_are_not_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (
        ["mount", "iscsi://u%topsecret@h:bad/", "/x"],
        ["moutn", "iscsi://u%topsecret@h/", "/x"],
        ["iscsi://u%topsecret@h/"],
        ["mount", URL, "/x", "-o", "chap_secret=topsecret"],
        ["mount", URL, "/x", "extra,chap_secret=topsecret"],
        ["mount", URL, "/nonexistent", "-o", "chap_user=u,chap_secret=topsecret"],
        ["discover", "iscsi://u%topsecret@h:bad"],
    ):
        assert run("orion-iscsifs", words) != 0
        captured = capsys.readouterr()
        assert "topsecret" not in captured.err + captured.out, words


def test_descriptions() -> None:
    assert describe(UsageError("a: b", advice="c")) == "a: b (c)"
    group = ExceptionGroup("g", [ExceptionGroup("h", [ConnectFailed("h:1: refused")])])
    assert describe(group) == "h:1: refused"
    assert describe(FileNotFoundError(2, "No such file", "/x")) == "/x: No such file"
    assert "internal error: KeyError" in describe(KeyError("x"))


def test_status_without_mounts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orion-iscsifs", ["status", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    assert isinstance(document["mounts"], list)


def test_install_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "orion-iscsifs"
    program.parent.mkdir()
    program.touch()
    monkeypatch.setattr("sys.argv", [str(program)])
    words = ["install-helpers", "--prefix", str(tmp_path)]
    for _ in range(2):  # it can be run again
        assert run("orion-iscsifs", words) == 0
    for name in helpers_module.HELPERS:
        assert (tmp_path / "sbin" / name).readlink() == program
    foreign = tmp_path / "sbin" / helpers_module.HELPERS[0]
    foreign.unlink()
    foreign.write_text("somebody else's")
    capsys.readouterr()
    assert run("orion-iscsifs", words) == 1
    assert "somebody else" in capsys.readouterr().err
    assert foreign.read_text() == "somebody else's"


def test_mount_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orion-iscsifs", ["mount", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in OPTIONS.keys() - SECRET_WORDS:
        (line,) = (line for line in lines if re.match(rf"  {name}(=|  )", line))
        assert len(line) < 100
    assert not any(line.startswith("  chap_secret=") for line in lines)


def test_an_unwritable_state_folder_is_no_usage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORION_ISCSIFS_STATE", "/dev/null/state")
    monkeypatch.setattr("orion_iscsifs.initiator.identity._read_name", lambda _path: None)
    for words in ([], ["--debug"]):
        assert run("orion-iscsifs", ["mount", URL, str(tmp_path), *words]) == 32
        assert "ORION_ISCSIFS_STATE" in capsys.readouterr().err


def test_help_lists_every_command(command: Command) -> None:
    shown = command.ok("--help")
    for name in ("mount", "umount", "discover", "status", "flush", "target", "demo"):
        assert f"\n  {name} " in shown
    done = command.run()
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr
