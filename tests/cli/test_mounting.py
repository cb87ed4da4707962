"""The life of a daemon: start, refusals, umount, signals, death. Over a fake data path."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from orion_iscsifs.fuse import mountpoint
from orion_iscsifs.testing.programs import wait_until
from tests.cli.conftest import SIZE, URL, Command

pytestmark = pytest.mark.fuse


def test_mount_write_umount(command: Command) -> None:
    command.mount()
    assert command.lun.read_bytes() == command.backing.read_bytes()
    data = os.urandom(100_000)
    with command.lun.open("r+b") as file:
        file.write(data)
    assert command.backing.read_bytes()[:100_000] != data
    status = json.loads(command.ok("status", "--json"))["mounts"][0]
    assert status["mountpoint"] == str(command.folder)
    assert status["source"] == URL
    assert status["state"] == "ok"
    assert status["luns"][0]["dirty_bytes"] == 100_000
    assert status["luns"][0]["oldest_dirty_age_s"] is None
    assert status["luns"][0]["writes"] > 0
    inside = json.loads((command.folder / ".orion/status.json").read_text())
    assert inside["mounts"][0]["pid"] == status["pid"]
    assert "orion_iscsifs_lun_dirty_bytes" in (command.folder / ".orion/metrics").read_text()
    assert "lun1" in command.ok("status")
    command.ok("umount", command.folder)
    assert not command.is_mounted()
    assert command.backing.read_bytes()[:100_000] == data
    assert not Path(f"/proc/{status['pid']}/cmdline").exists() or _is_zombie(status["pid"])
    assert not list((command.home / "run").glob("*.sock"))


def _is_zombie(pid: int) -> bool:
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_flush(command: Command) -> None:
    command.mount()
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    command.ok("flush", command.folder)
    assert command.backing.read_bytes()[:3] == b"abc"
    command.ok("umount", command.folder)


def test_umount_waits_for_the_flush(command: Command) -> None:
    command.mount(FAKE_FLUSH_S="1")
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    started = time.monotonic()
    command.ok("umount", command.folder)
    assert time.monotonic() - started > 1
    assert command.backing.read_bytes()[:3] == b"abc"


def test_umount_of_a_busy_mount_loses_nothing(command: Command) -> None:
    command.mount()
    with command.lun.open("r+b") as file:
        file.write(b"abc")
        file.flush()
        done = command.run("umount", command.folder)
        assert done.returncode == 1
        assert "in use by" in done.stderr
        assert command.is_mounted()
        assert command.backing.read_bytes()[:3] == b"abc"
        file.write(b"def")
    command.ok("umount", command.folder)
    assert command.backing.read_bytes()[:6] == b"abcdef"


def test_umount_while_the_target_is_away(command: Command) -> None:
    away = command.home / "away"
    away.touch()
    command.mount(FAKE_FLUSH_FAILS=str(away))
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    done = command.run("umount", command.folder)
    assert done.returncode == 1
    assert "the target has gone" in done.stderr
    assert "nothing is lost" in done.stderr
    assert command.is_mounted()
    assert command.run("flush", command.folder).returncode == 1
    away.unlink()
    command.ok("umount", command.folder)
    assert command.backing.read_bytes()[:3] == b"abc"


def test_umount_with_a_timeout(command: Command) -> None:
    command.mount(FAKE_FLUSH_S="3")
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    done = command.run("umount", "--timeout", "0.5", command.folder)
    assert done.returncode == 1
    assert "3 bytes are not on the target" in done.stderr
    assert command.is_mounted()
    command.ok("umount", command.folder)


def test_umount_force_gives_up(command: Command) -> None:
    away = command.home / "away"
    away.touch()
    command.mount(FAKE_FLUSH_FAILS=str(away))
    file = os.open(command.lun, os.O_RDWR)
    os.write(file, b"abc")
    done = command.run("umount", "--force", "--timeout", "1", command.folder)
    assert done.returncode == 0
    assert "never reached the target: 3" in done.stderr
    assert "was in use" in done.stderr
    with pytest.raises(OSError, match="not connected"):
        os.close(file)
    assert not command.is_mounted()
    command.wait_gone()
    assert "3 bytes were given up" in command.log()


def test_umount2_alone_lets_the_daemon_finish(command: Command) -> None:
    command.mount(FAKE_FLUSH_S="0.7")
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    mountpoint.unmount(str(command.folder))
    # A new mount of the same folder waits for the daemon of the earlier one.
    command.mount()
    assert command.lun.read_bytes()[:3] == b"abc"
    assert command.backing.read_bytes()[:3] == b"abc"
    command.ok("umount", command.folder)


def test_the_daemon_tries_again_after_the_unmount(command: Command) -> None:
    away = command.home / "away"
    away.touch()
    command.mount(FAKE_FLUSH_FAILS=str(away))
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    mountpoint.unmount(str(command.folder))
    done = command.run("umount", "--timeout", "0.5", command.folder)
    assert done.returncode == 1
    assert "still writes" in done.stderr
    away.unlink()
    command.ok("umount", command.folder)
    assert command.backing.read_bytes()[:3] == b"abc"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_signals(command: Command, number: int, busy: bool) -> None:
    command.mount()
    file = os.open(command.lun, os.O_RDWR)
    try:
        os.write(file, b"abc")
        if not busy:
            os.close(file)
        os.kill(command.pid(), number)
        command.wait_gone()
    finally:
        if busy:  # its user sees an error from now on
            with pytest.raises(OSError, match="not connected"):
                os.close(file)
    assert not command.is_mounted()
    assert command.backing.read_bytes()[:3] == b"abc"


def test_the_second_signal_gives_up(command: Command) -> None:
    away = command.home / "away"
    away.touch()
    command.mount(FAKE_FLUSH_FAILS=str(away))
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    pid = command.pid()
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while "not on the target yet" not in command.log():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not command.is_mounted()
    os.kill(pid, signal.SIGTERM)
    command.wait_gone()
    assert "3 bytes were given up" in command.log()


def test_a_daemon_that_hangs(command: Command) -> None:
    """Every command ends in time with one line; `umount --force` ends the daemon."""
    command.mount()
    pid = command.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        commands: dict[str, list[str | Path]] = {
            "status": ["status", "--json"],
            "mount": ["mount", URL, command.folder],
            "umount": ["umount", "--timeout", "2", command.folder],
        }
        with ThreadPoolExecutor() as threads:
            runs = {name: threads.submit(command.run, *words) for name, words in commands.items()}
        done = {name: run.result() for name, run in runs.items()}
        for outcome in done.values():
            assert "not answer" in outcome.stderr
            assert outcome.stderr.count("\n") == 1
        assert [outcome.returncode for outcome in done.values()] == [0, 32, 1]
        (shown,) = (
            mount
            for mount in json.loads(done["status"].stdout)["mounts"]
            if mount["mountpoint"] == str(command.folder)
        )
        assert (shown["state"], shown["pid"]) == ("failed", pid)
        command.ok("umount", "--force", "--timeout", "0.1", command.folder)
        assert not command.is_mounted()
        assert not Path(f"/proc/{pid}/cmdline").exists() or _is_zombie(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_mount_leaves_nothing(command: Command, number: int) -> None:
    environment = {**command.environment, "FAKE_OPEN_S": "4"}
    arguments = command.arguments("mount", URL, command.folder)
    with subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, text=True
    ) as in_front:
        assert in_front.stderr is not None
        wait_until(lambda: any((command.home / "run").glob("*.lock")), what="the daemon's lock")
        in_front.send_signal(number)
        if number == signal.SIGINT:
            assert in_front.wait(20) == 32
            assert "interrupted" in in_front.stderr.read()
    lock = next((command.home / "run").glob("*.lock"))
    with lock.open() as file:  # the daemon holds it until it ends
        deadline = time.monotonic() + 20
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the daemon stays"
                time.sleep(0.05)
    assert not command.is_mounted()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6])
def test_an_interrupt_at_any_moment(command: Command, after_s: float) -> None:
    """Also just when the daemon says who it is, or that it is ready."""
    environment = {**command.environment, "FAKE_OPEN_S": "0.2"}
    arguments = command.arguments("mount", URL, command.folder)
    with subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, text=True
    ) as in_front:
        wait_until(lambda: any((command.home / "run").glob("*.lock")), what="the daemon's lock")
        time.sleep(after_s)
        in_front.send_signal(signal.SIGINT)
        code = in_front.wait(20)
    if code == 0:
        assert command.is_mounted()
        command.ok("umount", command.folder)
    assert code in (0, 32, -signal.SIGINT, 130)  # the last two: before or after all that counts
    assert not command.is_mounted()


INTERRUPTED_FORK = """
import os, pathlib, signal, sys, time
from orion_iscsifs.cli import daemonize
from orion_iscsifs.cli.report import Failed

fork = os.fork
begun = pathlib.Path(sys.argv[1] + ".begun")

def interrupted_fork():
    pid = fork()
    if pid:
        while not begun.exists():  # only then can the daemon be ended in order
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    return pid

def body(ready):
    def end(*_):
        pathlib.Path(sys.argv[1]).touch()
        os._exit(0)
    signal.signal(signal.SIGTERM, end)
    begun.touch()
    time.sleep(20)

os.fork = interrupted_fork
try:
    daemonize.run_in_background(body, failure=32)
except Failed as error:
    print(error)
"""


def test_an_interrupt_while_it_forks_is_not_lost(tmp_path: Path) -> None:
    """It comes between the fork and the wait for the daemon: it is acted on, once, in the wait."""
    ended = tmp_path / "ended"
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_FORK, str(ended)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "interrupted" in done.stdout
    wait_until(ended.exists, what="the daemon's end")


def test_in_the_foreground(command: Command) -> None:
    arguments = command.arguments("mount", "-f", URL, command.folder)
    with subprocess.Popen(arguments, env=command.environment, stderr=subprocess.PIPE) as daemon:
        try:
            deadline = time.monotonic() + 20
            while not command.is_mounted():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            command.ok("umount", command.folder)
            assert daemon.wait(10) == 0
        finally:
            daemon.kill()


def test_a_dead_mount_is_cleaned_up(command: Command) -> None:
    command.mount()
    os.kill(command.pid(), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not mountpoint.is_dead(str(command.folder)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert json.loads(command.ok("status", "--json", command.folder))["mounts"][0]["state"] == (
        "failed"
    )
    done = command.run("mount", URL, command.folder)
    assert done.returncode == 32
    assert "daemon died" in done.stderr
    done = command.run("umount", command.folder)
    assert done.returncode == 0
    assert "daemon had died" in done.stderr
    assert not command.is_mounted()
    command.mount()
    command.ok("umount", command.folder)


def test_a_mount_point_in_use(command: Command) -> None:
    command.mount()
    done = command.run("mount", URL, command.folder)
    assert done.returncode == 32
    assert "busy" in done.stderr
    assert done.stderr.count("\n") == 1
    command.ok("umount", command.folder)


def test_the_stacks_error_comes_back(command: Command) -> None:
    done = command.run("mount", URL, command.folder, FAKE_OPEN_ERROR="h:3260: connection refused")
    assert done.returncode == 32
    assert done.stderr == ("orion-iscsifs: h:3260: connection refused (is the target running?)\n")
    assert not command.is_mounted()
    done = command.run("mount", URL, command.folder, "--debug", FAKE_OPEN_ERROR="h:3260: refused")
    assert "Traceback" in done.stderr


def test_a_daemon_that_dies_at_its_start(command: Command) -> None:
    command.backing.unlink()
    done = command.run("mount", URL, command.folder)
    assert done.returncode == 32
    assert "No such file" in done.stderr


@pytest.mark.parametrize("way", ["url", "option", "file"])
def test_a_secret_shows_nowhere(command: Command, way: str) -> None:
    secret, words = "topsecretindeed", [URL, str(command.folder)]
    if way == "url":
        words[0] = URL.replace("://", f"://u%{secret}@")
    elif way == "option":
        words += ["-o", f"chap_user=u,chap_secret={secret}"]
    else:
        path = command.home / "secret"
        path.write_text(secret + "\n")
        path.chmod(0o644)
        words += ["-o", f"chap_user=u,chap_secret_file={path}"]
    done = command.run("mount", *words)
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stderr
    pid = command.pid()
    shown = [
        done.stderr,
        done.stdout,
        Path("/proc/mounts").read_text(),
        Path(f"/proc/{pid}/cmdline").read_text(),
        command.ok("status", "--json"),
        command.ok("status"),
        *(path.read_text() for path in (command.folder / ".orion").iterdir()),
    ]
    command.ok("umount", command.folder)
    shown.append(command.log())
    assert "orion-iscsifs mount iscsi://" in shown[3]
    for text in shown:
        assert secret not in text


def test_options_reach_the_mount(command: Command) -> None:
    command.mount("-o", "ro,mode=0444,uid=12,_netdev,x-systemd.automount", "-o", "hide_control")
    info = command.lun.stat()
    assert (info.st_mode & 0o777, info.st_uid, info.st_size) == (0o444, 12, SIZE)
    assert os.listdir(command.folder) == ["lun1"]
    with pytest.raises(OSError, match="Read-only"):
        command.lun.open("r+b")
    command.ok("umount", command.folder)


def test_the_form_that_mount8_calls(command: Command) -> None:
    command.ok(URL, command.folder, "-o", "rw,dev,suid")
    done = command.run(command.folder, "-n", program="umount.fuse.orion-iscsifs")
    assert done.returncode == 0, done.stderr
    done = command.run(
        URL, command.folder, "-n", "-o", "rw,user", program="mount.fuse.orion-iscsifs"
    )
    assert done.returncode == 0, done.stderr
    assert command.is_mounted()
    with command.lun.open("r+b") as file:
        file.write(b"abc")
    done = command.run(command.folder, "-l", program="umount.fuse.orion-iscsifs")
    assert done.returncode == 0, done.stderr
    command.wait_gone()
    assert command.backing.read_bytes()[:3] == b"abc"
