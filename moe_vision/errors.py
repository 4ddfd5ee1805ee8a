"""Errors about config files: every problem at once, each with its key, value, cause and hint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN_VALUE = 200
"""Longest text of a value in a message, in characters."""


def shortened(value: Any) -> str:
    """The value as Python writes it, cut after `SHOWN_VALUE` characters."""
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer with more digits than Python prints
        shown = f"a {type(value).__name__} that cannot be printed"
    return shown if len(shown) <= SHOWN_VALUE else shown[: SHOWN_VALUE - 3] + "…"


@dataclass(frozen=True)
class Problem:
    """One fault. path: the key, with dots between levels; cure: a hint how to fix it."""

    path: str
    value: Any
    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.path} = {shortened(self.value)}: {self.cause}; {self.cure}"


class ConfigError(ValueError):
    """All problems of one config. source: its file, or what else holds it."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, list(problems)
        lines = [f"{source}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"]
        super().__init__("\n".join(lines + [f"  {problem}" for problem in self.problems]))
