"""A policy by its name and `key=value` settings, as the command line has them."""

from collections.abc import Sequence
from typing import Annotated, Any

from moe_vision.config import Config, Registered, apply_override, validate
from moe_vision.registry import suggest
from moe_vision.slicing import SLICING, SlicingPolicy


class SlicingConfig(Config):
    """A policy alone, without a model."""

    slicing: Annotated[SlicingPolicy, Registered(SLICING)]


def policy_of(name: str, settings: Sequence[str] = ()) -> SlicingPolicy:
    """The policy `name` with the published settings, and `settings` in their place.

    Raises ValueError for an unknown name, ConfigError for settings that are unknown or do not fit.
    """
    if name not in SLICING:
        raise ValueError(f"slicing policy '{name}': {suggest(name, list(SLICING))}")
    values: dict[str, Any] = {"slicing": {"type": name}}
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise ValueError(f"setting '{setting}' of slicing '{name}': write KEY=VALUE, as max_slices=9")
        if key == "type":
            raise ValueError(f"setting '{setting}': the policy is '{name}'; choose another by its name")
        values = apply_override(values, f"slicing.{setting}")
    return validate(SlicingConfig, values, source=f"--policy {name}").slicing
