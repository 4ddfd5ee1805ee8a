"""Images → un-normalised views of one size: every expert resizes and normalises for itself, inside the model."""

import torch
import torchvision.transforms.v2.functional as tvf
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling

PADDING_GREY = 127
"""Experts differ in their mean colour; padding is mid-grey for all of them."""


class MoeVisionImageProcessor(TorchvisionBackend):
    """size: {height, width} of the views. do_pad: pad to the canvas's shape, centred; if false, stretch to it."""

    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    size = {"height": 336, "width": 336}
    default_to_square = True
    do_pad = True
    do_resize = True
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True

    def pad_to_shape(self, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pad [3, H, W] to the aspect ratio of height:width, the image in the middle."""
        image_height, image_width = image.shape[-2:]
        target_height = max(image_height, round(image_width * height / width))
        target_width = max(image_width, round(image_height * width / height))
        top, left = (target_height - image_height) // 2, (target_width - image_width) // 2
        right, bottom = target_width - image_width - left, target_height - image_height - top
        return tvf.pad(image, [left, top, right, bottom], fill=PADDING_GREY)

    def _preprocess(  # type: ignore[override]
        self, images, do_resize, size, resample, do_rescale, rescale_factor, do_pad, return_tensors, **kwargs
    ):
        """[3, H, W] in 0..255 each → pixel_values [V, 3, height, width] in [0, 1]."""
        views = []
        for image in images:
            if min(image.shape[-2:]) < 1:
                raise ValueError(f"an image of {image.shape[-2]}x{image.shape[-1]} pixels has nothing to see")
            if do_pad:
                image = self.pad_to_shape(image, size.height, size.width)
            if do_resize:
                image = self.resize(image=image, size=size, resample=resample)
            # Bicubic overshoots; views are promised in [0, 1].
            views.append(self.rescale(image, rescale_factor).clamp(0, 1) if do_rescale else image)
        return BatchFeature(data={"pixel_values": torch.stack(views)}, tensor_type=return_tensors)
