"""Images → un-normalised views, as a slicing policy plans them: every expert resizes and normalises for itself, inside
the model.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs

from moe_vision.modeling.configuration_moe_vision import SavesItsCode, from_plain
from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy
from moe_vision.slicing.image_files import read_image
from moe_vision.slicing.pixels import ImageError, to_bytes, to_rgb
from moe_vision.slicing.plan import Plan, Size
from moe_vision.slicing.render import render


class MoeVisionImagesKwargs(ImagesKwargs, total=False):  # as transformers' own classes do
    """slicing: {type, …} in place of the model's own. images_per_prompt: for each image, how many its prompt has."""

    slicing: dict
    images_per_prompt: list


class MoeVisionImageProcessor(SavesItsCode, TorchvisionBackend):
    """slicing: {type, …}, the policy with its numbers of tokens, as the model's config has it.

    Sizes of views follow from it, so `size`, `do_resize`, `do_pad` and the like are refused.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = MoeVisionImagesKwargs
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True
    slicing: Any = None
    images_per_prompt: Any = None

    def __init__(self, slicing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slicing = slicing or {"type": "none"}

    @property
    def policy(self) -> SlicingPolicy:
        return from_plain(SLICING, self.slicing)

    def plan(self, size: Size, images: int = 1) -> Plan:
        """Plan an image of `size` (height, width), one of `images` in its prompt. Raises PlanError if it is refused."""
        return self.policy.plan(size, images)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Rows of pixel_values that an image of this size becomes."""
        return len(self.plan((height, width)).views)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths, URLs, data URIs and base64 strings as Pillow images, in the lists that they came in; images as they
        came. Raises ImageError. The library's own would drop transparency and cut 16 bits off.
        """
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return read_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self, image: Any, do_convert_rgb: bool | None = None, input_data_format: Any = None, device: Any = None,
        do_rescale: bool | None = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """One image as bytes [3, H, W], by the rule of `slicing/pixels.py`.

        Raises ImageError if the range of its values is not known, or is not the 0..1 of `do_rescale=False`.
        """
        if isinstance(image, Image.Image):
            pixels, input_data_format = torch.from_numpy(np.array(to_rgb(image))), ChannelDimension.LAST
            scaled_before = False
        else:
            values = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
            pixels = to_bytes(values)
            scaled_before = values.is_floating_point() and values.max().item() < 2
        if do_rescale is False and not scaled_before:
            raise ImageError("do_rescale=False says that pixel values are in 0..1, and these are not: leave it out")
        made: torch.Tensor = super().process_image(
            pixels, do_convert_rgb=False, input_data_format=input_data_format, device=device
        )
        if made.shape[0] == 4:
            made = pil_to_tensor(to_rgb(to_pil_image(made.cpu()))).to(made.device)
        if made.shape[0] not in (1, 3):
            raise ImageError(f"it has {made.shape[0]} channels: give 1, 3, or 4 with transparency as the last")
        return made.expand(3, -1, -1)

    def _preprocess(  # type: ignore[override]
        self, images, do_rescale, rescale_factor, slicing, images_per_prompt, return_tensors, **kwargs
    ):  # fmt: skip
        """[3, H, W] each → pixel_values [V, 3, H, W] in [0, 1], views in the plans' order, smaller ones with zeros to
        their right and below; image_sizes [V, 3]: of each view's image height, width, images in the prompt.

        Images are bytes; `rescale_factor` is what `do_rescale` multiplies them by.
        vLLM cuts every tensor here into images by their numbers of views, so each has a row for every view.
        """
        given = [name for name in ("size", "crop_size", "pad_size", "do_resize", "do_pad", "do_center_crop", "resample")
                 if kwargs.get(name) is not None]  # fmt: skip
        if given:
            raise ValueError(f"{given}: views follow from `slicing` ({slicing}); leave these out, or change that")
        policy: SlicingPolicy = from_plain(SLICING, slicing)
        counts = images_per_prompt or [1] * len(images)
        views, sizes, tokens = [], [], []
        for image, count in zip(images, counts, strict=True):
            plan = policy.plan((image.shape[-2], image.shape[-1]), count)
            factor = rescale_factor if do_rescale else 1 / 255
            views += [self.rescale(view, factor).clamp(0, 1) for view in render(image, plan.views)]
            sizes += [[*plan.size, count]] * len(plan.views)
            tokens.append(plan.num_tokens)
        data = {"pixel_values": join_views(views), "image_sizes": torch.tensor(sizes), "num_image_tokens": tokens}
        return BatchFeature(data=data, tensor_type=return_tensors)


LARGEST_BATCH_BYTES = 8_000_000_000
"""Bytes that a batch of views may take where most of them are padding."""


def join_views(views: Sequence[torch.Tensor]) -> torch.Tensor:
    """Views [..., 3, H, W] of any sizes as one tensor [V, 3, H, W], the smaller with zeros to the right and below.

    Raises ValueError where views of far apart shapes would become a tensor that is nearly all padding.
    """
    height = max(view.shape[-2] for view in views)
    width = max(view.shape[-1] for view in views)
    number = sum(view.numel() // (3 * view.shape[-2] * view.shape[-1]) for view in views)
    size = number * 3 * height * width * views[0].element_size()
    if size > LARGEST_BATCH_BYTES and size > 4 * sum(view.numel() * view.element_size() for view in views):
        tallest = max((tuple(view.shape[-2:]) for view in views), key=lambda shape: shape[0])
        widest = max((tuple(view.shape[-2:]) for view in views), key=lambda shape: shape[1])
        raise ValueError(
            f"views of {tallest[0]}x{tallest[1]} and of {widest[0]}x{widest[1]} pixels in one batch would take "
            f"{size / 1e9:.0f} GB, nearly all padding: put these images into batches of their own"
        )
    padded = [F.pad(view, (0, width - view.shape[-1], 0, height - view.shape[-2])) for view in views]
    return torch.cat([view.reshape(-1, 3, height, width) for view in padded])
