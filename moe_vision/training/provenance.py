"""Where a result comes from: versions, commit, device."""

import datetime
import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moe_vision import __version__
from moe_vision.files import read_json
from moe_vision.training.checkpoints import write_atomically
from moe_vision.training.git_commit import commit_of

DISTRIBUTION = "moe-vision"


def packages() -> dict[str, str]:
    """Versions of what the package needs, extras included, as far as it is installed; a checkout that is not installed
    itself falls back to everything that is."""
    try:
        needed = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in metadata.requires(DISTRIBUTION) or ()}
    except metadata.PackageNotFoundError:
        needed = {distribution.name for distribution in metadata.distributions() if distribution.name}
    found = {}
    for name in sorted(needed, key=str.lower):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """The accelerator that trains, or the CPU with its number of threads."""
    if not torch.accelerator.is_available():
        return {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # it is available
    library: Any = getattr(torch, kind.type)
    name = library.get_device_name() if hasattr(library, "get_device_name") else kind.type
    return {"type": kind.type, "name": name, "count": torch.accelerator.device_count()}


def environment(folder: Path) -> dict[str, Any]:
    """What this process runs on. folder: whose git commit is meant."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "moe_vision": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "packages": packages(),
        "git": None if (commit := commit_of(folder)) is None else {"commit": commit},
        "device": device(),
    }


def record_environment(path: Path) -> None:
    """Add this process to a JSON list: a run that was resumed may have seen several environments."""
    starts = read_json(path, "list of environments", list) if path.exists() else []
    write_atomically(path, json.dumps([*starts, environment(Path.cwd())], indent=1))
