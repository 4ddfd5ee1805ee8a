"""What every mixer (many maps → tokens) and adapter (vision → language) share.

A config is a frozen dataclass registered under its `type:` name. It knows its output shape from its input shapes alone,
so that placeholders, validation and cost need no weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from moe_vision.types import FeatureMap, Injection, MapShape, TokenShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    type_name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the registered name as `type`."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"type": self.type_name, **values}


@dataclass(frozen=True, kw_only=True)
class MixerConfig(FusionConfig):
    """Config of a mixer."""

    def injected(self, inputs: Mapping[str, Any]) -> str | None:
        """The expert between whose blocks this mixer speaks, if it does."""
        return None

    def check_blocks(self, blocks: int) -> None:
        """Raises ValueError where the injected expert has too few blocks to speak between."""

    def shape(self, inputs: Mapping[str, MapShape]) -> TokenShape:
        """Tokens of one view. Raises ValueError where the experts' maps cannot be mixed."""
        raise NotImplementedError(f"{type(self).__name__} must define shape()")

    def build(self, inputs: Mapping[str, MapShape]) -> "Mixer":
        raise NotImplementedError(f"{type(self).__name__} must define build()")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(FusionConfig):
    """Config of an adapter; `hidden_size` is the width of the language model."""

    @property
    def projected_by(self) -> str | None:
        """The branch whose adapter's `projection` follows this one, if it has none of its own."""
        return None

    def projection_channels(self, inputs: TokenShape) -> int | None:
        """Width of what its module's `projection` takes, where another branch may use that; null if it has none."""
        return None

    @property
    def any_grid(self) -> bool:
        """Whether one module takes views of every grid; false where its parameters belong to the one it is for."""
        return True

    def shape(self, inputs: TokenShape, hidden_size: int) -> TokenShape:
        """Tokens of one view as the language model sees them. Raises ValueError where the input does not fit."""
        raise NotImplementedError(f"{type(self).__name__} must define shape()")

    def build(self, inputs: TokenShape, hidden_size: int) -> "Adapter":
        raise NotImplementedError(f"{type(self).__name__} must define build()")


class Mixer(nn.Module):
    """Many maps → tokens. forward: mapping of expert name to FeatureMap [V, C, h, w] → VisualTokens [V, N, C].

    injected: the expert that runs last, because the others speak between its blocks.
    """

    injected: str | None = None

    def injection(self, maps: Mapping[str, FeatureMap]) -> Injection:
        """What happens between the blocks of `injected`, given the other experts' maps."""
        raise NotImplementedError(f"{type(self).__name__} must define injection()")

    def forward(self, maps: Mapping[str, FeatureMap]) -> VisualTokens:
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class Adapter(nn.Module):
    """Vision → language. forward: VisualTokens [V, N, C] → VisualTokens [V, N', D]."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        raise NotImplementedError(f"{type(self).__name__} must define forward()")
