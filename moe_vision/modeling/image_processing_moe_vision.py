"""Images → un-normalised views of one size: every expert resizes and normalises for itself, inside the model."""

from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, SizeDict


class MoeVisionImageProcessor(TorchvisionBackend):
    """size: {height, width} of the views. An image of another shape is padded to theirs (do_pad), cropped to theirs
    after the shorter side fits (do_center_crop), or stretched. padding_colour: red, green, blue in 0..255.
    """

    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    size = {"height": 336, "width": 336}
    default_to_square = True
    do_pad = True
    do_center_crop = False
    do_resize = True
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True
    padding_colour: Any = (127, 127, 127)

    def __init__(self, padding_colour: Any = (127, 127, 127), **kwargs: Any) -> None:
        super().__init__(**{"crop_size": kwargs.get("size", self.size), **kwargs})
        self.padding_colour = list(padding_colour)

    def pad_to_shape(self, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pad [3, H, W] to the aspect ratio of height:width, the image in the middle."""
        image_height, image_width = image.shape[-2:]
        target_height = max(image_height, round(image_width * height / width))
        target_width = max(image_width, round(image_height * width / height))
        top, left = (target_height - image_height) // 2, (target_width - image_width) // 2
        right, bottom = target_width - image_width - left, target_height - image_height - top
        return tvf.pad(image, [left, top, right, bottom], fill=self.padding_colour)

    def cover(self, image: torch.Tensor, height: int, width: int, resample: Any) -> torch.Tensor:
        """Resize [3, H, W] until it just covers height x width, and cut that from its middle."""
        image_height, image_width = image.shape[-2:]
        scale = max(height / image_height, width / image_width)
        covering = (max(height, int(image_height * scale)), max(width, int(image_width * scale)))
        image = resize(image, covering, resample)
        top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
        return image[:, top : top + height, left : left + width]

    def _preprocess(  # type: ignore[override]
        self, images, do_resize, size: SizeDict, resample, do_rescale, rescale_factor, do_pad, do_center_crop,
        return_tensors, **kwargs,
    ):  # fmt: skip
        """[3, H, W] in 0..255 each → pixel_values [V, 3, height, width] in [0, 1]."""
        assert size.height is not None and size.width is not None  # sizes are given as {height, width} here
        height, width = size.height, size.width
        views = []
        for image in images:
            if min(image.shape[-2:]) < 1:
                raise ValueError(f"an image of {image.shape[-2]}x{image.shape[-1]} pixels has nothing to see")
            if do_pad:
                image = self.pad_to_shape(image, height, width)
            if do_center_crop:
                image = self.cover(image, height, width, resample)
            elif do_resize:
                image = resize(image, (height, width), resample)
            # Bicubic overshoots on float images; views are promised in [0, 1].
            views.append(self.rescale(image, rescale_factor).clamp(0, 1) if do_rescale else image)
        return BatchFeature(data={"pixel_values": torch.stack(views)}, tensor_type=return_tensors)


def resize(image: torch.Tensor, size: tuple[int, int], resample: Any) -> torch.Tensor:
    """Resize [3, H, W] to (height, width).

    Bytes go through Pillow, which every published system used: torchvision differs from it by up to two grey levels.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    if image.dtype == torch.uint8 and image.device.type == "cpu":
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized = picture.resize((size[1], size[0]), PILImageResampling(int(resample)))
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    mode = tvf.InterpolationMode(Image.Resampling(int(resample)).name.lower())
    return tvf.resize(image, list(size), mode, antialias=True)
