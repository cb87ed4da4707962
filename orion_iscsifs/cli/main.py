"""The entry point: which command, by which name, in whose syntax.

Three callers have three syntaxes: a user (`orion-iscsifs COMMAND …`), mount(8) and fstab
(`orion-iscsifs SOURCE MOUNTPOINT -o …`), and mount(8)'s and umount(8)'s helpers, which are links to
this program under other names (`cli/helpers.py`).
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from orion_iscsifs import __version__
from orion_iscsifs.cli.report import PROGRAM, Exit, one_line, report, say, verbosity
from orion_iscsifs.config.words import OPTIONS
from orion_iscsifs.errors import UsageError
from orion_iscsifs.url import redact

COMMANDS: Final = {
    "mount": ("orion_iscsifs.cli.mount", "mount a target's LUNs as device files"),
    "umount": ("orion_iscsifs.cli.umount", "flush, unmount, and wait until the data is safe"),
    "discover": ("orion_iscsifs.cli.discover", "list the targets of a portal"),
    "inspect": ("orion_iscsifs.cli.inspect", "show what a LUN is, can do, and who reserved it"),
    "status": ("orion_iscsifs.cli.status", "show mounts, sessions and caches"),
    "flush": ("orion_iscsifs.cli.flush", "make everything written durable on the target"),
    "trim": ("orion_iscsifs.cli.trim", "discard a range of a LUN, so that the target frees it"),
    "cache": ("orion_iscsifs.cli.cache", "the persistent logs on the local disk"),
    "luks": ("orion_iscsifs.cli.luks", "make LUKS volumes, add and remove their keys"),
    "install-helpers": ("orion_iscsifs.cli.install_helpers", "link mount(8)'s helpers into /sbin"),
    "target": ("orion_iscsifs.cli.target", "the embedded iSCSI target"),
    "demo": ("orion_iscsifs.cli.demo", "try everything out, without any configuration"),
}


class Commands(click.Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Mount an iSCSI target through FUSE: one device file per LUN.

    `orion-iscsifs SOURCE MOUNTPOINT [-o OPT,…]` is short for `mount`. Add --debug to any command
    for a traceback with an error.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    program = Path(sys.argv[0]).name
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(program, words))


def run(program: str, words: list[str]) -> int:
    """Carry the command out; returns the exit code. Never raises."""
    verbosity.debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if program.startswith(("mount.", "umount.")):
            return _run_helper(program, words)
        return _run_command(_as_mount(words))
    except KeyboardInterrupt:
        say("interrupted")
        return Exit.FAILED
    except BrokenPipeError:
        return Exit.FAILED
    except Exception as error:
        return report(error)


def _run_helper(program: str, words: list[str]) -> int:
    helpers = importlib.import_module("orion_iscsifs.cli.helpers")
    code: int = helpers.run_helper(program, words)
    return code


def _run_command(words: list[str]) -> int:
    try:
        result = cli.main(words, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return Exit.USAGE
    except click.ClickException as error:
        raise _usage(error, words) from error
    except click.Abort:
        raise KeyboardInterrupt from None
    return result if isinstance(result, int) else Exit.DONE


def _usage(error: click.ClickException, words: Sequence[str]) -> UsageError:
    command = next((word for word in words if word in COMMANDS), None)
    what = f"{command}: " if command else ""
    why = redact(one_line(error.format_message())).rstrip(".")
    why = why[:1].lower() + why[1:]
    advice = f"{PROGRAM} {command or ''} --help".replace("  ", " ")
    if isinstance(error, click.NoSuchOption):
        name = error.option_name.lstrip("-")
        why = f"no such option {error.option_name!r}"
        if command == "mount" and name in OPTIONS:
            advice = f"write -o {name}{'=…' if OPTIONS[name].shown else ''}"
        elif error.possibilities:
            advice = f"did you mean {error.possibilities[0]}?"
    elif command is None and words:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else advice
    return UsageError(what + why, advice=advice)


def _as_mount(words: list[str]) -> list[str]:
    """`SOURCE MOUNTPOINT …` becomes `mount SOURCE MOUNTPOINT …`."""
    first = words[0] if words else ""
    return ["mount", *words] if first not in COMMANDS and "/" in first else words
