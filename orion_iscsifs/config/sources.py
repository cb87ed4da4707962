"""Where words come from: `-o` strings, TOML files, the query of a URL. Later ones win."""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from orion_iscsifs.config.values import Value
from orion_iscsifs.config.words import SECRET_WORDS, is_generic, parse_value
from orion_iscsifs.errors import UsageError

Words = dict[str, Value]

_EXCLUDES: Final[Mapping[str, str]] = {
    "chap_secret": "chap_secret_file",
    "chap_secret_file": "chap_secret",
    "mutual_secret": "mutual_secret_file",
    "mutual_secret_file": "mutual_secret",
}
"""Two spellings of one setting: the later one replaces the earlier."""


def parse_options(lists: Iterable[str]) -> Words:
    """The words of one or several `-o a,b=c` lists; `\\,` is a comma inside a value."""
    words: Words = {}
    for text in lists:
        for item in re.split(r"(?<!\\),", text):
            name, _, value = item.strip().replace("\\,", ",").partition("=")
            if name and not is_generic(name):
                merge(words, dict([parse_value(name, value)]))
    return words


def parse_query(query: Mapping[str, str]) -> Words:
    """The words after the `?` of a URL."""
    words: Words = {}
    for name, text in query.items():
        merge(words, dict([parse_value(name, text)]))
    if "config" in words:
        raise UsageError("option config: it can't be in a URL", advice="use -o config=FILE")
    return words


def parse_toml(path: Path) -> Words:
    """The words of one file of settings."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"settings {path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"settings {path}: no valid TOML: {error}") from None
    words: Words = {}
    for name, value in content.items():
        if isinstance(value, dict):
            raise UsageError(f"settings {path}: [{name}]: there are no sections, only keys")
        try:
            merge(words, dict([parse_value(name, _toml_text(value))]))
        except UsageError as error:
            raise UsageError(f"settings {path}: {error}", advice=error.advice) from None
    if "config" in words:
        raise UsageError(f"settings {path}: config: a file can't name another file")
    return words


def merge(words: Words, later: Words) -> None:
    """Put `later` over `words`."""
    for name, value in later.items():
        if name == "rw":
            words["ro"] = not value
            continue
        words.pop(_EXCLUDES.get(name, ""), None)
        words[name] = value


def gather(
    options: Sequence[str], url_words: Words, environment: Mapping[str, str] = os.environ
) -> Words:
    """Everything that is set for one mount: files, then the URL, then `-o`."""
    from_options = parse_options(options)
    words: Words = {}
    for path in default_files(environment):
        if path.is_file():
            merge(words, parse_toml(path))
    config = from_options.pop("config", None)
    if isinstance(config, str):
        merge(words, parse_toml(Path(config).expanduser()))
    merge(words, url_words)
    merge(words, from_options)
    return words


def default_files(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The files of INTERFACE §1, whether they exist or not; later wins."""
    home = environment.get("XDG_CONFIG_HOME") or str(
        Path(environment.get("HOME") or "~").expanduser() / ".config"
    )
    name = Path("orion-iscsifs") / "config.toml"
    return [Path("/etc") / name, Path(home) / name]


def names_secret(options: Iterable[str]) -> bool:
    """Whether an `-o` list carries a secret itself instead of a file's name."""
    return any(word in SECRET_WORDS for word in parse_options(options))


def _toml_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "+".join(str(item) for item in value)
    return str(value)
