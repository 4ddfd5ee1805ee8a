"""From a picture and its plan to one tensor for each view."""

from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image

from moe_vision.slicing.plan import Crop, Filter, Pad, Resize, Size, Step, View


def render(image: torch.Tensor, views: Sequence[View]) -> list[torch.Tensor]:
    """Picture [3, H, W] in 0..255 → one [3, h, w] for each view; steps that views share are taken once."""
    done: dict[tuple[Step, ...], torch.Tensor] = {(): image}

    def after(steps: tuple[Step, ...]) -> torch.Tensor:
        if steps not in done:
            done[steps] = apply(after(steps[:-1]), steps[-1])
        return done[steps]

    return [after(view.steps) for view in views]


def apply(image: torch.Tensor, step: Step) -> torch.Tensor:
    """One step of a view on [3, H, W]."""
    if isinstance(step, Resize):
        return resize(image, step.size, step.filter)
    (height, width), (top, left) = step.size, step.offset
    if isinstance(step, Crop):
        return image[:, top : top + height, left : left + width]
    assert isinstance(step, Pad)
    canvas = image.new_tensor(step.colour).view(3, 1, 1).repeat(1, height, width)
    canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


def resize(image: torch.Tensor, size: Size, filter: Filter) -> torch.Tensor:
    """Resize [3, H, W] to (height, width).

    Bytes go through Pillow, which every published system used: torchvision differs from it by up to two grey levels.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    if image.dtype == torch.uint8 and image.device.type == "cpu":
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized = picture.resize((size[1], size[0]), Image.Resampling[filter.upper()])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return tvf.resize(image, list(size), tvf.InterpolationMode(filter), antialias=True)
