"""Run one case, within a limit of time, and judge how it ended."""

import contextlib
import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_vision.cli import command
from moe_vision.cli.boundary import explained

SECONDS = 60
"""Longest that a case may take; on a busy machine most take a hundredth."""

KINDS = ("right", "refused", "traceback", "hang", "wrong", "unnamed")


class WrongError(AssertionError):
    """A case whose result differs from what an independent reading gives."""


class HangError(BaseException):
    """A case that takes too long. No Exception, so that nobody catches it."""


@dataclass(frozen=True)
class Verdict:
    """kind: right (accepted, and equal to the oracle where there is one), refused (a clean error that names the thing),
    traceback, hang, wrong (accepted, and not equal), unnamed (a clean error that does not name the thing)."""

    kind: str
    text: str

    @property
    def good(self) -> bool:
        return self.kind in ("right", "refused")


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise HangError in this block after a number of seconds."""

    def late(number: int, frame: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judged(work: Callable[[], Any], names: tuple[str, ...]) -> Verdict:
    """names: texts of which a refusal has to hold one."""
    try:
        with limited(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            work()
    except HangError:
        return Verdict("hang", f"more than {SECONDS} s")
    except WrongError as error:
        return Verdict("wrong", str(error))
    except Refused as error:
        return refusal(str(error), names)
    except Exception as error:
        text, code = explained(error)
        if code != 2:
            return Verdict("traceback", f"{type(error).__name__}: {text[:600]}")
        return refusal(text, names)
    return Verdict("right", "")


class Refused(Exception):
    """A command that ended with exit code 2."""


def refusal(text: str, names: tuple[str, ...]) -> Verdict:
    """A clean error, if it says anything of the thing."""
    named = not names or any(name in text for name in names)
    return Verdict("refused" if named and len(text) < 6000 else "unnamed", text[:600])


def run_command(arguments: list[str]) -> str:
    """Run a command in this process and return its standard output. Raises Refused, WrongError."""
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["moe-vision", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    text = err.getvalue()
    if code == 2:
        raise Refused(text)
    if code != 0:
        raise RuntimeError(f"exit code {code}: {text}")
    return out.getvalue()
