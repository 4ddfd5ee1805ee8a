"""Read files that users name, and write files whole or not at all.

Reading checks that a path is a regular file before it is opened: a named pipe would wait forever. Every error names
the file and what to do.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a named pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)

HINTS = {
    errno.ENOSPC: "make room there, or write to another folder",
    errno.EDQUOT: "make room there, or write to another folder",
    errno.EFBIG: "raise the limit of file sizes, or write to another folder",
    errno.EROFS: "write to another folder",
    errno.EACCES: "check the permissions of the file and of its folders",
    errno.EPERM: "check the permissions of the file and of its folders",
    errno.ELOOP: "its links lead in a circle: give the file itself",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOENT: "give a path that exists",
    errno.ENOTDIR: "a part of the path is a file, not a folder: give another path",
    errno.EISDIR: "give a file",
    errno.EINVAL: "give another path",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EIO: "check the disk",
}
"""Hints by the number of an OSError."""

JSON_KINDS = {dict: "an object", list: "a list"}


class FileError(ValueError):
    """A file that cannot be read, or holds something else than it should. path, cause, hint: parts of the message."""

    def __init__(self, what: str, path: Path | str, cause: str, hint: str) -> None:
        self.path, self.cause, self.hint = path, cause, hint
        super().__init__(f"{what} '{path}' {cause}: {hint}")


class WriteError(OSError):
    """Something could not be written; files that existed before are unchanged."""


def os_hint(error: OSError) -> str:
    """A hint for an error of the operating system."""
    return HINTS.get(error.errno or 0, "check the path")


def resolved(path: Path | str) -> Path:
    """The absolute path with its links followed; unlike `Path.resolve`, also of links that lead in a circle."""
    return Path(os.path.realpath(path))


def check_not_input(output: Path, inputs: Iterable[Path | str], what: str) -> None:
    """Raise FileError, which calls the output `what`, where writing it would destroy one of a command's inputs."""
    if output.exists() and any(resolved(path) == resolved(output) for path in inputs):
        raise FileError(what, output, "is an input of this command, and would be overwritten", "give another file")


def check_regular(path: Path, what: str) -> None:
    """Raise FileError, which calls the file `what`, unless `path` leads to a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        if isinstance(error, FileNotFoundError):
            raise FileError(what, path, "does not exist", "give a file that exists") from None
        hint = os_hint(error) if isinstance(error, OSError) else "give another path"
        raise FileError(what, path, f"cannot be read ({reason(error)})", hint) from None
    if not stat.S_ISREG(mode):
        kind = next((text for test, text in KINDS if test(mode)), "is no regular file")
        raise FileError(what, path, kind, "give a regular file")


def reason(error: Exception) -> str:
    """What an error says, without the path and the number of an OSError."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def read_text(path: Path, what: str, limit: int | None = None) -> str:
    """Text of a UTF-8 file, without a byte order mark. limit: most bytes.

    Raises FileError where it is missing, unreadable, no regular file, too large or not UTF-8.
    """
    check_regular(path, what)
    try:
        content = path.read_bytes() if limit is None else read_at_most(path, limit + 1)
    except OSError as error:
        raise FileError(what, path, f"cannot be read ({reason(error)})", os_hint(error)) from None
    if limit is not None and len(content) > limit:
        raise FileError(what, path, f"has more than {limit:,} bytes", "give the right file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise FileError(what, path, f"is not UTF-8 text ({where})", "save it as UTF-8") from None


def read_at_most(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file."""
    with path.open("rb") as file:
        return file.read(size)


def parse_json(text: str, path: Path | str, what: str) -> Any:
    """The value of a JSON text; `path` and `what` are for messages. Raises FileError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FileError(what, path, f"is not JSON ({error.msg}, {where})", "fix its syntax") from None
    except RecursionError:
        raise FileError(what, path, "is nested too deeply", "write flatter JSON") from None
    except ValueError:  # an integer of more digits than Python reads
        raise FileError(what, path, "holds a number that is too long", "write a shorter number") from None


def read_json(path: Path, what: str, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """The object (or list, by `kind`) that a JSON file holds. Raises FileError."""
    value = parse_json(read_text(path, what), path, what)
    if not isinstance(value, kind):
        found = f"holds a JSON {json_name(value)}, not {JSON_KINDS[kind]}"
        raise FileError(what, path, found, "restore the file, or give another one")
    return value


def json_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def json_text(value: Any) -> str:
    """JSON with an indent of one, with characters as they are, lone surrogates as escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return json.dumps(value, indent=1) if any("\ud800" <= character <= "\udfff" for character in text) else text


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Raise WriteError, which names `what` and `path`, where a write in this block fails."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        text = f"{what} '{path}' cannot be written ({reason(error)}): {os_hint(error)}"
        raise WriteError(error.errno, text) from error
    except SafetensorError as error:  # the library has no other kind for a full disk
        number = next((n for n in HINTS if f"os error {n}" in str(error) or f"code: {n}," in str(error)), errno.ENOSPC)
        raise WriteError(number, f"{what} '{path}' cannot be written ({error}): {HINTS[number]}") from error


@contextmanager
def replacing(path: Path, what: str) -> Iterator[Path]:
    """A new path for content that takes the place of `path` when the block ends without an error. Raises WriteError."""
    named = Path(os.path.abspath(path))  # `.` has no name
    temporary = named.with_name(f".{named.name}.partial")
    with writing(what, path):
        if path.exists() and not path.is_file():
            raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "it exists and is no regular file")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, what: str) -> None:
    """Write UTF-8 text whole or not at all; lone surrogates become `\\udXXX`. Raises WriteError."""
    with replacing(path, what) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def umask() -> int:
    """The process's umask: permission bits that new files do not get."""
    try:  # without the system call, which changes the mask for other threads for a moment
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE):
            return int(found[1], 8)
    except OSError:
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def give_usual_modes(path: Path) -> None:
    """Give a file, or all files and folders below a folder, the modes of new ones under the umask. safetensors writes
    files that only their owner can read."""
    mask = umask()
    if path.is_dir() and not path.is_symlink():
        for folder, _, files in os.walk(path):
            os.chmod(folder, 0o777 & ~mask)
            for name in files:
                if not os.path.islink(os.path.join(folder, name)):
                    os.chmod(os.path.join(folder, name), 0o666 & ~mask)
    else:
        path.chmod(0o666 & ~mask)
