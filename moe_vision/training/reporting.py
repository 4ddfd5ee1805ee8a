"""Services that logs go to besides the metrics file: those that Trainer knows and that are installed."""

from collections.abc import Sequence

from transformers.integrations import integration_utils

from moe_vision.config import ConfigError, Problem
from moe_vision.registry import suggest


def check_reporters(names: Sequence[str]) -> None:
    """Raise ConfigError for a reporter that Trainer does not know, or whose package is not installed."""
    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    installed = integration_utils.get_available_reporting_integrations()
    problems = []
    for name in names:
        if name not in known:
            problems.append(Problem("report_to", name, "no such reporter", suggest(name, known)))
        elif name not in installed:
            there = ", ".join(installed) or "none"
            cure = f"install it, or leave it out (installed: {there})"
            problems.append(Problem("report_to", name, "its package is not installed", cure))
    if problems:
        raise ConfigError("train config", problems)
