"""From a passphrase to the volume key, and what a new key slot should cost.

Key derivation takes seconds of processor time and up to gigabytes of memory: it goes to a thread,
and never begins when the memory is not there.

What Python can do about secrets in memory: intermediate keys live as short as possible, and no
message, repr or file has one. It can't wipe them: `bytes` are copied by the interpreter and by
OpenSSL's bindings at will. docs/encryption.md says what follows from that.
"""

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import trio

from orion_iscsifs.block.device import BlockDevice
from orion_iscsifs.crypt import headers
from orion_iscsifs.crypt.errors import LuksError, WrongPassphrase
from orion_iscsifs.crypt.kdf import (
    ARGON2_MEMORY_KIB_MAX,
    ARGON2_WORK_KIB_MAX,
    ITERATIONS_MAX,
    ITERATIONS_MIN,
    Argon2,
    Kdf,
    Pbkdf2,
)
from orion_iscsifs.crypt.volume import Slot, Volume

log = logging.getLogger(__name__)

PbkdfName = Literal["pbkdf2", "argon2i", "argon2id"]
SALT_BYTES: Final = 32
MEMORY_KIB_DEFAULT: Final = 1 << 20
"""1 GiB, as cryptsetup; never more than a quarter of the host's memory."""
MEMORY_KIB_MIN: Final = 32
PASSES_MIN: Final = 4
LANES_MAX: Final = 4


async def unlock(device: BlockDevice, volume: Volume, passphrase: bytes) -> tuple[Slot, bytes]:
    """The slot that opens, and the volume key. Raises WrongPassphrase or LuksError."""
    slots = volume.in_order()
    if not slots:
        raise LuksError("LUKS: the volume has no key slot: nothing opens it any more")
    for slot in slots:
        key = await unlock_slot(device, volume, slot, passphrase)
        if key is not None:
            return slot, key
    raise WrongPassphrase("LUKS: no key slot opens with this passphrase")


async def unlock_slot(
    device: BlockDevice, volume: Volume, slot: Slot, passphrase: bytes
) -> bytes | None:
    """The volume key; None: it is another passphrase's slot."""
    material = await headers.read(device, slot.offset_bytes, slot.material_bytes)
    if len(material) < slot.material_bytes:
        raise LuksError(f"LUKS key slot {slot.number}: lies past the end of the device")
    check_memory(slot.kdf)

    def derive() -> bytes | None:
        key = slot.unseal(passphrase, material)
        return key if volume.digest.matches(key) else None

    # A derivation can't be stopped; nobody waits for one whose result is not wanted any more.
    return await trio.to_thread.run_sync(derive, abandon_on_cancel=True)


def check_memory(kdf: Kdf) -> None:
    """Raises LuksError where a derivation would drive this host out of memory."""
    available = _meminfo_kib("MemAvailable")
    if available is not None and kdf.memory_kib > available:
        raise LuksError(
            f"LUKS: the key slot takes {kdf.memory_kib >> 10} MiB of memory to open;"
            f" {available >> 10} MiB are available",
            advice="free some, or add a key with less (`luks add-key --pbkdf-memory`) elsewhere",
        )


def _meminfo_kib(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


# -- what a new slot costs -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """What the user wants a guess to cost; None: measured, so that it takes `iter_time_s`."""

    pbkdf: PbkdfName = "argon2id"
    hash: str = "sha256"
    iter_time_s: float = 2.0
    iterations: int | None = None
    """Of PBKDF2, or passes of Argon2."""
    memory_kib: int | None = None
    lanes: int | None = None


async def choose(costs: Costs, length: int) -> Kdf:
    """A new salt, and costs as they are wanted. `length`: of the key that is derived.

    Raises LuksError for costs out of bounds.
    """
    return await trio.to_thread.run_sync(_choose, costs, length)


def _choose(costs: Costs, length: int) -> Kdf:
    salt = os.urandom(SALT_BYTES)
    if costs.pbkdf == "pbkdf2":
        iterations = costs.iterations
        return Pbkdf2(costs.hash, iterations or _measure_pbkdf2(costs, length), salt)
    lanes = costs.lanes or min(LANES_MAX, os.cpu_count() or 1)
    largest = costs.memory_kib or _memory_default()
    if costs.iterations is not None:
        return Argon2(costs.pbkdf, costs.iterations, largest, lanes, salt)
    probe = Argon2(costs.pbkdf, 1, min(largest, 64 << 10), lanes, salt)
    passes = costs.iter_time_s / _seconds(probe, length) * probe.memory_kib
    memory = costs.memory_kib or max(min(largest, int(passes / PASSES_MIN)), 8 * lanes)
    time_cost = min(max(int(passes / memory), PASSES_MIN), ARGON2_WORK_KIB_MAX // memory)
    return replace(probe, time=time_cost, memory_kib=memory)


def _memory_default() -> int:
    total = _meminfo_kib("MemTotal") or MEMORY_KIB_DEFAULT
    return max(min(MEMORY_KIB_DEFAULT, total // 4, ARGON2_MEMORY_KIB_MAX), MEMORY_KIB_MIN)


def _measure_pbkdf2(costs: Costs, length: int) -> int:
    """More and more iterations, until they take long enough to be measured."""
    probe = Pbkdf2(costs.hash, ITERATIONS_MIN, bytes(SALT_BYTES))
    while (taken := _seconds(probe, length)) < 0.1:
        probe = replace(probe, iterations=probe.iterations * 4)
    wanted = int(probe.iterations * costs.iter_time_s / taken)
    return min(max(wanted, ITERATIONS_MIN), ITERATIONS_MAX)


def _seconds(kdf: Kdf, length: int) -> float:
    started = time.perf_counter()
    kdf.derive(b"a passphrase of some length", length)
    return max(time.perf_counter() - started, 1e-6)
