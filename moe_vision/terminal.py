"""What a terminal shows: names from configs, data and file names are printed literally.

rich reads `[bold]`, `[/x]` and `:smile:` in strings as markup. `terminal` makes consoles that do not, and `say` and
`headline` print literally on any console, as on one that a Python caller gives.
"""

import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def terminal(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A console without markup, emoji codes and highlighting."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def printable(text: str) -> str:
    """Text with control characters, as terminals act on, written as escapes."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(console: Console, text: str, *, soft_wrap: bool = False) -> None:
    """Print text literally."""
    console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)


def headline(console: Console, text: str) -> None:
    """Print a rule with a title, literally."""
    console.rule(Text(printable(text)))


def cell(*parts: str | tuple[str, str]) -> Text:
    """A table's cell: literal texts, or pairs of a text and its style."""
    return Text.assemble(
        *[printable(part) if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts]
    )


def tolerate_any_text() -> None:
    """Have the standard streams write what their encoding lacks as escapes, in place of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def encodable(text: str) -> bool:
    """Whether standard output can write the text as it is."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
