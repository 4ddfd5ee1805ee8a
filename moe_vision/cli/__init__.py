"""The command line: `moe-vision COMMAND --help` teaches each step.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

from moe_vision.cli import micro, configs, training, models, schema, imports  # noqa: F401, I001 - the order of `--help`
from moe_vision.cli.common import app
from moe_vision.cli.boundary import command, leave, main

__all__ = ["app", "command", "leave", "main"]
