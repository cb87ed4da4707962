"""Where tables go: stdout, without colours when asked, never squeezed when it is no terminal.

What is printed is text as it stands: rich would take `[fe80::1]` for a style, leave it out, and
make a picture of the `:key:` in a target's name.
"""

import os
import sys
from typing import Final

from rich.console import Console

_WIDTH_OF_A_PIPE: Final = 400


def console() -> Console:
    """A console for tables; honours NO_COLOR."""
    return Console(
        no_color=bool(os.environ.get("NO_COLOR")) or None,
        width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE,
        highlight=False,
        markup=False,
        emoji=False,
    )
