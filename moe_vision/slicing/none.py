"""No slices: the whole image in one view of the experts' size."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy, TokensOf
from moe_vision.slicing.canvas import padded
from moe_vision.slicing.plan import Crop, Plan, Resize, Segment, Size, Step, View


@SLICING.register("none")
@dataclass(frozen=True, kw_only=True)
class NoSlicing(SlicingPolicy):
    """size: canvas (height, width) in pixels, null for one that holds every expert's input.

    fit: `pad` keeps an image's shape and pads it to the canvas, `stretch` gives its shape up, `crop` its margins.
    padding_colour: red, green and blue in 0..255; mid-grey, because experts differ in their mean.
    """

    has_slices: ClassVar[bool] = False
    one_view: ClassVar[bool] = True

    size: Size | None = None
    fit: Literal["pad", "stretch", "crop"] = "pad"
    padding_colour: tuple[int, int, int] = (127, 127, 127)
    tokens_per_view: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "padding_colour", tuple(self.padding_colour))
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))
            if min(self.size) < 1:
                raise ValueError(f"size {list(self.size)} of slicing 'none': both sides must be at least 1 px")
        if len(self.padding_colour) != 3 or not all(0 <= value <= 255 for value in self.padding_colour):
            raise ValueError(f"padding_colour {list(self.padding_colour)}: give red, green and blue in 0..255")

    @property
    def canvas(self) -> Size:
        return self.size or (336, 336)

    def plan_image(self, size: Size, images: int) -> Plan:
        view = View("overview", self.steps(size))
        return Plan(self.type_name, size, (Segment((view,), (1, 1), (1, self.tokens_per_view or 576)),))

    def steps(self, size: Size) -> tuple[Step, ...]:
        """From an image to the canvas."""
        (height, width), (image_height, image_width) = self.canvas, size
        if self.fit == "stretch":
            return (Resize(self.canvas),)
        if self.fit == "pad":
            return padded(size, self.canvas, self.padding_colour)
        scale = max(height / image_height, width / image_width)
        covering = (max(height, int(image_height * scale)), max(width, int(image_width * scale)))
        offset = ((covering[0] - height) // 2, (covering[1] - width) // 2)
        return (Resize(covering), Crop(self.canvas, offset))

    def fitted(self, tokens_of: TokensOf) -> "NoSlicing":
        fitted = self.with_tokens("tokens_per_view", tokens_of("overview", self.canvas).num_tokens)
        assert isinstance(fitted, NoSlicing)
        return replace(fitted, size=self.canvas)
