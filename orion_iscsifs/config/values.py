"""How the text of an option becomes a value: one parser per kind of value. Pure."""

import re
from collections.abc import Callable
from typing import Final

from orion_iscsifs.config.settings import TIER_LEVEL_MAX, ChapAlgorithm

Value = bool | int | float | str | tuple[ChapAlgorithm, ...] | tuple[str, ...] | None
Parser = Callable[[str], Value]
"""Raises ValueError with the words that follow "option x=y: "."""

SIZE_BYTES_MAX: Final = 1 << 50
QUEUE_DEPTH_MAX: Final = 4096
PATHS_MAX: Final = 16
"""Portals, or source addresses, of one mount."""
MANUAL: Final = "manual"
_SUFFIX_SHIFT: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_ALGORITHMS: Final = {
    "sha3-256": ChapAlgorithm.SHA3_256,
    "sha256": ChapAlgorithm.SHA256,
    "sha1": ChapAlgorithm.SHA1,
    "md5": ChapAlgorithm.MD5,
}


def size_bytes(text: str) -> int:
    """`64K`, `1.5G`, `4096`: a positive number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", text.strip().upper(), re.ASCII)
    if match is None:
        raise ValueError("is no size: a number with K, M, G or T")
    size = int(float(match[1]) * (1 << _SUFFIX_SHIFT[match[2]]))
    if not 0 < size <= SIZE_BYTES_MAX:
        raise ValueError("is out of range for a size")
    return size


def _number(text: str, why: str) -> float:
    if re.fullmatch(r"-?[0-9]{1,9}(?:\.[0-9]{1,6})?", text.strip(), re.ASCII) is None:
        raise ValueError(why)
    return float(text)


def seconds(text: str) -> float:
    value = _number(text, "is no number of seconds")
    if value <= 0:
        raise ValueError("must be more than 0 seconds")
    return value


def seconds_or_never(text: str) -> float:
    value = _number(text, "is no number of seconds")
    if value < 0 and value != -1:
        raise ValueError("must be 0 or more seconds, or -1 for ever")
    return value


def interval(text: str) -> float:
    value = _number(text, "is no number of seconds")
    if value < 0:
        raise ValueError("must be 0 (never) or more seconds")
    return value


def flag(text: str) -> bool:
    if text.lower() in {"", "1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError("takes no value")


def nonempty(text: str) -> str:
    if not text:
        raise ValueError("needs a value")
    return text


def numeric_id(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) is None or int(text) > 0xFFFFFFFE:
        raise ValueError("is no numeric id")
    return int(text)


def mode(text: str) -> int:
    if re.fullmatch(r"0?[0-7]{3}", text, re.ASCII) is None:
        raise ValueError("is no file mode: three octal digits, 0600 for one")
    return int(text, 8)


def choice(*words: str) -> Parser:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"is unknown: {', '.join(words)}")
        return text

    return parse


def whole_number(low: int, high: int) -> Parser:
    def parse(text: str) -> int:
        digits = text.strip()
        if re.fullmatch(r"[0-9]{1,6}", digits, re.ASCII) and low <= int(digits) <= high:
            return int(digits)
        raise ValueError(f"is no number from {low} to {high}")

    return parse


def queue_depth(text: str) -> int | None:
    if text == "auto":
        return None
    if re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) and 1 <= int(text) <= QUEUE_DEPTH_MAX:
        return int(text)
    raise ValueError(f"is neither auto nor a number from 1 to {QUEUE_DEPTH_MAX}")


def readahead(text: str) -> str | int:
    return text if text in {"auto", "off"} else size_bytes(text)


def tier_level(text: str) -> str | int:
    if text == "adaptive":
        return text
    if re.fullmatch(r"[0-9]{1,2}", text, re.ASCII) and int(text) <= TIER_LEVEL_MAX:
        return int(text)
    raise ValueError(f"is neither adaptive nor a level from 0 to {TIER_LEVEL_MAX}")


def algorithms(text: str) -> tuple[ChapAlgorithm, ...]:
    """`sha256+md5` or `sha256:md5`: a comma would end an `-o` option."""
    names = [name for name in re.split(r"[+:,\s]+", text.strip().lower()) if name]
    unknown = [name for name in names if name not in _ALGORITHMS]
    if unknown or not names:
        raise ValueError(f"is unknown: {', '.join(_ALGORITHMS)}, joined with '+'")
    return tuple(dict.fromkeys(_ALGORITHMS[name] for name in names))


def _joined(text: str, what: str) -> tuple[str, ...]:
    """The parts between '+' signs: a comma would end an `-o` option."""
    parts = [part.strip() for part in text.split("+")]
    if not all(parts) or any(character.isspace() for character in "".join(parts)):
        raise ValueError(f"is no list of {what}, joined with '+'")
    if len(parts) > PATHS_MAX:
        raise ValueError(f"names more than {PATHS_MAX} {what}")
    return tuple(dict.fromkeys(parts))


def portals(text: str) -> tuple[str, ...]:
    """`10.0.0.1:3260+[fd00::1]+storage`; `url.parse_portal` takes each apart."""
    found = _joined(text, "portals")
    for portal in found:
        if (
            re.fullmatch(r"(?:[^\s/@?#,:\[\]]+|\[[^\s/@?#,\[\]]+\])(?::[0-9]{1,5})?", portal)
            is None
        ):
            raise ValueError(f"names {portal}, which is no host[:port]")
    return found


def binds(text: str) -> tuple[str, ...]:
    return _joined(text, "addresses or interfaces")


def failback(text: str) -> str | float:
    """`immediate` is 0 seconds."""
    if text == "immediate":
        return 0.0
    return text if text == MANUAL else interval(text)
