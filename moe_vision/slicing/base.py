"""What every slicing policy shares. A policy is a frozen dataclass registered under its `type:` name; it imports no
torch, because plans are integer geometry.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

from moe_vision.slicing.plan import Marker, Plan, PlanError, Role, Size


class TokenCount(Protocol):
    """How many tokens a model makes of one view; `grid` is None where they are no raster."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def grid(self) -> Size | None: ...


TokensOf = Callable[[Role, Size], TokenCount]
"""Tokens of a view of this role and size (height, width)."""


MOST_VIEWS = 10_000
"""Most views that a policy may be allowed to cut an image into. Planning more would take minutes."""


@dataclass(frozen=True, kw_only=True)
class SlicingPolicy:
    """A pure function from an image's (height, width) to a `Plan`.

    Token settings (`tokens_per_view` and the like) are null in a model's config: there its adapters say how many tokens
    a view becomes. Alone, as in `moe-vision plan`, null is the published number.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    type_name: ClassVar[str] = ""
    has_slices: ClassVar[bool] = True
    one_view: ClassVar[bool] = False  # whether every image is a single view of one size, and so of as many tokens

    def plan(self, size: Size, images: int = 1) -> Plan:
        """Plan an image of `size` (height, width), one of `images` in its prompt. Raises PlanError if it is refused."""
        check_image_size(size)
        if images < 1:
            raise PlanError(f"a prompt of {images} images: give at least one")
        return self.plan_image((int(size[0]), int(size[1])), images)

    def plan_image(self, size: Size, images: int) -> Plan:
        raise NotImplementedError(f"{type(self).__name__} must define plan_image()")

    def plan_video(self, size: Size, frames: int) -> Plan:
        """Plan a video of `frames` pictures of `size`. Raises PlanError where the policy has none."""
        raise PlanError(f"slicing '{self.type_name}' has no plan for videos: choose tiles, anyres or oryx")

    def markers(self) -> tuple[Marker, ...]:
        """Every marker that a plan may hold."""
        return ()

    def learnt_markers(self) -> list[str]:
        """Names of the markers that are no token of the tokenizer, but embeddings of the model's own."""
        return [marker.name for marker in self.markers() if marker.text is None]

    def fitted(self, tokens_of: TokensOf) -> "SlicingPolicy":
        """The policy with the token settings of a model. Raises ValueError where the model cannot serve it."""
        raise NotImplementedError(f"{type(self).__name__} must define fitted()")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the registered name as `type`."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"type": self.type_name, **values}

    def with_tokens(self, name: str, number: int) -> "SlicingPolicy":
        """The policy with setting `name`, which must be null or the same. Raises ValueError."""
        given = getattr(self, name)
        if given not in (None, number):
            raise ValueError(f"{name} {given} of slicing '{self.type_name}': this model makes {number}; leave it out")
        return replace(self, **{name: number})

    def check_positive(self, *names: str) -> None:
        """Raises ValueError for a setting below 1; null passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} of slicing '{self.type_name}': must be at least 1")

    def check_view_limit(self, name: str) -> None:
        """Raises ValueError for a number of views that is not from 1 to `MOST_VIEWS`."""
        self.check_positive(name)
        value = getattr(self, name)
        if value > MOST_VIEWS:
            raise ValueError(f"{name} {value} of slicing '{self.type_name}': must be at most {MOST_VIEWS}")


def check_image_size(size: Size) -> None:
    """Raises PlanError for an image without pixels."""
    if min(size) < 1:
        raise PlanError(f"an image of {size[0]}x{size[1]} pixels has nothing to see")


def raster(tokens: TokenCount, what: str) -> Size:
    """Grid of a view's tokens. Raises ValueError where they are none."""
    if tokens.grid is None:
        raise ValueError(f"{what} needs tokens on a raster; this branch gives none: choose another mixer or adapter")
    return tokens.grid


def square(tokens: TokenCount, what: str) -> int:
    """Side of a square grid of tokens. Raises ValueError where it is none."""
    grid = raster(tokens, what)
    if grid[0] != grid[1]:
        raise ValueError(f"{what} needs a square raster of tokens; this branch gives {list(grid)}")
    return grid[0]
