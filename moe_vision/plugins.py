"""Plug-ins: Python files that register more experts, mixers, adapters, selectors and slicing policies.

A config file runs plug-ins of its own folder and of the folders below it. Any other one needs the user's consent:
`--allow-plugins` or `--plugin FILE` on the command line, `allow_plugins=True` in Python, or a line in the trust file.
"""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

from moe_vision.errors import ConfigError, Problem
from moe_vision.files import FileError, check_regular, read_text, resolved


def trust_file() -> Path:
    """The file that lists trusted plug-ins, and folders of them, one absolute path a line; `#` begins a comment."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home) / "moe-vision" / "trusted_plugins"


def trusted() -> list[Path]:
    """Files and folders that the trust file lists. Raises FileError where it cannot be read."""
    file = trust_file()
    if not file.exists():
        return []
    lines = [line.strip() for line in read_text(file, "trust file").splitlines()]
    return [resolved(os.path.expanduser(line)) for line in lines if line and not line.startswith("#")]


def within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it; both without links."""
    return path == folder or folder in path.parents


def checked_plugin(name: str, folder: Path, allowed: bool, source: str, place: str = "plugins") -> str:
    """The absolute path of a plug-in that a config file in `folder` names.

    allowed: whether the user has consented to plug-ins of other folders. source, place: the file and key for messages.
    Raises ConfigError where it is missing, or outside the config's folder without consent.
    """
    path = resolved(folder / os.path.expanduser(name))
    try:
        check_regular(path, "plug-in")
    except FileError as error:
        cause = "no such file" if error.cause == "does not exist" else error.cause
        problem = Problem(place, str(path), cause, "give its path, relative to the config, or `--plugin FILE`")
        raise ConfigError(source, [problem]) from None
    if not (allowed or within(path, resolved(folder)) or any(within(path, item) for item in trusted())):
        hint = f"if you trust it, give --allow-plugins, or add it to '{trust_file()}'"
        problem = Problem(place, name, f"is outside the config's folder and would run '{path}'", hint)
        raise ConfigError(source, [problem])
    return str(path)


def import_plugin(path: Path, source: str = "plugins") -> None:
    """Run a plug-in, once in a process. Raises ConfigError if it is missing or fails."""
    path = resolved(path)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    name = f"moe_vision_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    try:
        check_regular(path, "plug-in")
    except FileError as error:
        cause = "no such file" if error.cause == "does not exist" else error.cause
        problem = Problem("plugins", str(path), cause, "give the path of a Python file, relative to the config")
        raise ConfigError(source, [problem]) from None
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        problem = Problem("plugins", str(path), "is no Python file", "give a file whose name ends in .py")
        raise ConfigError(source, [problem])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        cause = f"does not import: {type(error).__name__}: {error}"
        raise ConfigError(source, [Problem("plugins", str(path), cause, "mend the file")]) from error
