"""`orion-iscsifs luks` on files, as a user types it."""

import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Command

MIB = 1 << 20
CHEAP = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 20 * MIB)
    return path


def key(folder: Path, content: bytes = b"secret-of-this-test", name: str = "key") -> Path:
    path = folder / name
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


def failed(command: Command, *words: str | Path, code: int = 1) -> str:
    """The one line that it said."""
    done = command.run("luks", *words)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("orion-iscsifs: ")
    assert "secret-of" not in done.stdout + done.stderr
    return line


def test_a_life_of_a_volume(command: Command, image: Path, tmp_path: Path) -> None:
    first, second = key(tmp_path), key(tmp_path, b"secret-of-another\n", "second")
    command.ok("luks", "format", image, "--key-file", first, "--label", "mine", *CHEAP)
    assert "a LUKS volume on it" in failed(command, "format", image, "--key-file", first)
    argon2: list[str | Path] = [
        "--pbkdf-force-iterations",
        "4",
        "--pbkdf-memory",
        "64",
        "--pbkdf-parallel",
        "1",
    ]
    words: list[str | Path] = ["--key-file", first, "--new-key-file", second]
    command.ok("luks", "add-key", image, *words, *argon2)
    shown = command.ok("luks", "dump", image)
    assert "slot 0: type pbkdf2, hash sha256, iterations 1000" in shown
    assert "slot 1: type argon2id, passes 4, memory_kib 64, lanes 1" in shown
    document = json.loads(command.ok("luks", "dump", image, "--json"))
    assert document["version"] == 1
    assert document["target"] == str(image)
    assert document["luks"]["label"] == "mine"
    assert document["luks"]["cipher"] == "aes-xts-plain64"
    assert [slot["number"] for slot in document["luks"]["slots"]] == [0, 1]
    text = json.dumps(document) + shown
    for secret in ("salt", "digest", "secret-of"):
        assert secret not in text
    command.ok("luks", "remove-key", image, "--slot", "0")
    assert "no key slot opens" in failed(command, "remove-key", image, "--key-file", first)
    assert "is the last one" in failed(command, "remove-key", image, "--key-file", second)
    assert "no key in slot 7" in failed(command, "remove-key", image, "--slot", "7")
    command.ok("luks", "remove-key", image, "--key-file", second, "--force")
    words = ["--key-file", second, "--new-key-file", first]
    assert "no key slot" in failed(command, "add-key", image, *words)


def test_a_passphrase_from_stdin(command: Command, image: Path) -> None:
    def run(*words: str | Path, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command.arguments("luks", *words),
            input=stdin,
            env=command.environment,
            capture_output=True,
            timeout=60,
            check=False,
        )

    made = run("format", image, "--key-file", "-", *CHEAP, stdin=b"typed\n")
    assert made.returncode == 0, made.stderr
    other = key(image.parent)
    words: list[str | Path] = ["add-key", image, "--key-file", "-", "--new-key-file", other, *CHEAP]
    wrong = run(*words, stdin=b"typed")
    assert wrong.returncode == 1
    assert b"no key slot opens" in wrong.stderr
    assert run(*words, stdin=b"typed\n").returncode == 0
    empty = run("format", image, "--force", "--key-file", "-", stdin=b"")
    assert empty.returncode == 2
    assert b"stdin" in empty.stderr


def test_usage(command: Command, image: Path, tmp_path: Path) -> None:
    one = key(tmp_path)
    twice: list[str | Path] = ["add-key", image, "--key-file", "-", "--new-key-file", "-"]
    assert "stdin" in failed(command, *twice, code=2)
    assert "which one?" in failed(command, "remove-key", image, code=2)
    words: list[str | Path] = ["format", image, "--key-file", one]
    assert "47 bytes" in failed(command, *words, "--label", "x" * 48, code=2)
    assert "LUKS1" in failed(command, *words, "--type", "luks1", "--sector-size", "4096", code=2)
    assert "LUKS1" in failed(command, *words, "--type", "luks1", "--pbkdf", "argon2id", code=2)
    assert "Argon2" in failed(command, *words, "--pbkdf", "pbkdf2", "--pbkdf-memory", "64", code=2)
    assert "key-file" in failed(command, "format", image, code=2)
    assert "No such file" in failed(command, "format", image, "--key-file", tmp_path / "x", code=2)
    assert "No such file" in failed(command, "dump", tmp_path / "none", code=2)
    assert "neither a file" in failed(command, "dump", tmp_path, code=2)
    assert "neither a file" in failed(command, "dump", "/dev/null", code=2)
    assert "no LUN is named" in failed(
        command, "dump", "iscsi://h/iqn.2024-01.org.example:d", code=2
    )
    assert "-o options" in failed(command, "dump", image, "-o", "ro", code=2)
    assert not image.read_bytes().strip(b"\0"), "something was written"


def test_costs_out_of_bounds(command: Command, image: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [
        "format",
        image,
        "--key-file",
        key(tmp_path),
        "--pbkdf-force-iterations",
    ]
    huge = str(1 << 40)
    assert "iterations" in failed(command, *words, huge, "--pbkdf", "pbkdf2")
    assert "passes" in failed(command, *words, huge)
    assert "KiB of memory" in failed(command, *words, "4", "--pbkdf-memory", huge)
    assert not image.read_bytes().strip(b"\0"), "something was written"


def test_a_file_that_is_no_volume(command: Command, image: Path) -> None:
    assert "there is no header" in failed(command, "dump", image)


def test_a_file_that_is_too_small(command: Command, image: Path, tmp_path: Path) -> None:
    os.truncate(image, 3 * MIB)
    words: list[str | Path] = ["format", image, "--key-file", key(tmp_path), *CHEAP]
    line = failed(command, *words, code=2)
    assert "header alone takes" in line
    command.ok("luks", *words, "--type", "luks1")


def test_a_file_that_somebody_else_works_on(command: Command, image: Path, tmp_path: Path) -> None:
    with image.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use" in failed(command, "dump", image)
        assert "in use" in failed(command, "format", image, "--key-file", key(tmp_path))


def test_a_read_only_file(command: Command, image: Path, tmp_path: Path) -> None:
    """Whoever may not write gets told so; root may always."""
    if os.geteuid() == 0:
        pytest.skip("root may write every file")
    image.chmod(0o400)
    line = failed(command, "format", image, "--key-file", key(tmp_path), code=2)
    assert "Permission denied" in line


def test_a_measured_cost(command: Command, image: Path, tmp_path: Path) -> None:
    """Without explicit costs; a short time and little memory."""
    words: list[str | Path] = ["--iter-time", "20", "--pbkdf-memory", "1024"]
    command.ok("luks", "format", image, "--key-file", key(tmp_path), *words)
    slot = json.loads(command.ok("luks", "dump", image, "--json"))["luks"]["slots"][0]
    assert slot["kdf"]["type"] == "argon2id"
    assert slot["kdf"]["memory_kib"] == 1024
    assert slot["kdf"]["passes"] >= 4


def test_stdin_that_was_closed(command: Command, image: Path) -> None:
    words = command.arguments("luks", "format", image, "--key-file", "-", *CHEAP)
    closing = ["sh", "-c", 'exec "$@" <&-', "sh", *words]
    done = subprocess.run(
        closing, env=command.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "stdin has to hold" in done.stderr


def test_a_pipe_is_no_device(command: Command, image: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "neither a file" in failed(command, "dump", pipe, code=2)
    assert "neither a file" in failed(command, "format", pipe, "--key-file", key(tmp_path), code=2)


def test_costs_that_protect_nothing(command: Command, image: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["format", image, "--key-file", key(tmp_path)]
    words += ["--pbkdf-force-iterations"]
    assert "1000 at least" in failed(command, *words, "999", "--pbkdf", "pbkdf2", code=2)
    assert "4 at least" in failed(command, *words, "3", code=2)
    assert not image.read_bytes().strip(b"\0"), "something was written"


def test_what_a_terminal_would_obey_is_not_printed(
    command: Command, image: Path, tmp_path: Path
) -> None:
    words: list[str | Path] = ["--key-file", key(tmp_path), "--label", "\x1b[2Jü\n", *CHEAP]
    command.ok("luks", "format", image, *words)
    assert "label: \\x1b[2Jü\\n\n" in command.ok("luks", "dump", image)
    document = json.loads(command.ok("luks", "dump", image, "--json"))
    assert document["luks"]["label"] == "\x1b[2Jü\n"
