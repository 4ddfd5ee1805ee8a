"""Strings from configs, data and file names as text in Markdown: never markup, links, HTML or another row."""

import re

UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
MARKUP = re.compile(r"([\\`*\[\]|<>&~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z]))")
MAX_SHOWN = 300
"""Longest text of a card that is somebody's own, in characters."""


def one_line(text: object) -> str:
    """A text in one line without characters that are not seen, cut after `MAX_SHOWN` characters."""
    shown = " ".join(UNSEEN.sub(" ", str(text)).split())
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 1] + "…"


def plain(text: object) -> str:
    """A text that Markdown shows as it is: characters that could be markup are escaped."""
    return MARKUP.sub(r"\\\1", one_line(text)).replace("://", ":\\//")


def code(text: object) -> str:
    """A text as inline code, in a table too."""
    shown = re.sub(r"(?<=\\)\|", " |", one_line(text)).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if "`" in shown or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"
