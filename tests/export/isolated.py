"""Run a script where moe_vision cannot be imported: offline, with a Hugging Face cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).with_name("scripts")
BARRIER = """
import runpy, sys

class Barrier:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_vision":
            raise ImportError(f"an exported folder must do without moe_vision, and something imports {name!r}")

sys.meta_path.insert(0, Barrier())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def isolated_environment(home: Path) -> dict[str, str]:
    """Of a process with nothing of this one's: no cache, no path, no network, no accelerator."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return environment | {
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


def isolated_command(script: str, *arguments: Any, python: str = sys.executable) -> list[str]:
    """What runs scripts/SCRIPT.py behind the barrier."""
    return [python, "-c", BARRIER, str(SCRIPTS), str(SCRIPTS / f"{script}.py"), *map(str, arguments)]


def isolated(script: str, *arguments: Any, home: Path, timeout: float = 600, python: str = sys.executable) -> Any:
    """What scripts/SCRIPT.py prints as JSON on its last line. Raises AssertionError with its output if it fails."""
    home.mkdir(parents=True, exist_ok=True)
    ended = subprocess.run(
        isolated_command(script, *arguments, python=python), cwd=home, env=isolated_environment(home),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    assert ended.returncode == 0, f"{script} ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-6000:]}"
    return json.loads(ended.stdout.strip().splitlines()[-1])
