"""Secrets stay out of the process list, /proc/mounts, status, control files and logs."""

from pathlib import Path

import pytest

from tests.interop.conftest import TgtDisk
from tests.interop.product import Product, abandon

pytestmark = [pytest.mark.fuse, pytest.mark.interop("tgtd", "tgtadm")]

SECRET = "s3cret-of-mine"


@pytest.fixture
def guarded_disk(tgt_disk: TgtDisk) -> TgtDisk:
    tgt_disk.target.require_chap("somebody", SECRET)
    return tgt_disk


def process_words() -> str:
    """Every command line on this host."""
    words = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it ended meanwhile
    return "\n".join(words)


def with_secret(url: str) -> str:
    return url.replace("iscsi://", f"iscsi://somebody%{SECRET}@")


def test_a_secret_in_the_url_works_is_warned_about_and_never_shown(
    product: Product, guarded_disk: TgtDisk
) -> None:
    mountpoint = product.new_mountpoint()
    try:
        outcome = product("mount", with_secret(guarded_disk.url), mountpoint)
        assert "chap_secret_file" in outcome.stderr
        shown = [
            outcome.said,
            process_words(),
            Path("/proc/mounts").read_text(encoding="utf-8"),
            product("status", mountpoint, "--json").stdout,
            product("status", mountpoint).stdout,
        ]
        control = mountpoint / ".orion"
        shown += [
            (control / name).read_text(encoding="utf-8")
            for name in ("status.json", "config.toml", "metrics")
        ]
        assert not any(SECRET in text for text in shown)
        assert str(mountpoint) in process_words()
        assert "***" in (control / "config.toml").read_text(encoding="utf-8")
        product.umount(mountpoint)
    finally:
        abandon(mountpoint)


def test_a_secret_file_is_not_warned_about(product: Product, guarded_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    file = product.secret_file(SECRET)
    try:
        options = ("chap_user=somebody", f"chap_secret_file={file}")
        assert product.mount(guarded_disk.url, mountpoint, *options).said == ""
        product.umount(mountpoint)
    finally:
        abandon(mountpoint)


def test_debug_output_has_no_secret(product: Product, guarded_disk: TgtDisk) -> None:
    mountpoint = product.new_mountpoint()
    source = with_secret(guarded_disk.url)
    with product.start("--debug", "mount", source, mountpoint, "-f") as program:
        try:
            program.wait_until(lambda: (mountpoint / "lun1").exists())
            assert SECRET not in process_words()
            product("umount", mountpoint)
            program.wait(20)
        finally:
            abandon(mountpoint)
    assert SECRET not in program.log.read_text(encoding="utf-8", errors="replace")


def test_a_refused_login_does_not_print_the_secret(product: Product, guarded_disk: TgtDisk) -> None:
    wrong = guarded_disk.url.replace("iscsi://", "iscsi://somebody%another-secret@")
    outcome = product("mount", wrong, product.new_mountpoint(), code=32)
    assert "another-secret" not in outcome.said


def test_a_secret_file_for_everybodys_eyes_is_warned_about(
    product: Product, guarded_disk: TgtDisk
) -> None:
    file = product.secret_file(SECRET)
    file.chmod(0o644)
    mountpoint = product.new_mountpoint()
    try:
        options = ("chap_user=somebody", f"chap_secret_file={file}")
        outcome = product("mount", guarded_disk.url, mountpoint, "-o", ",".join(options), code=None)
        # Warned about or refused; either way the file is named and its content is not.
        assert str(file) in outcome.stderr
        assert SECRET not in outcome.said
    finally:
        abandon(mountpoint)
