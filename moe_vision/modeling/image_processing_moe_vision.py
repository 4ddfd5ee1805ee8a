"""Images → un-normalised views, as a slicing policy plans them: every expert resizes and normalises for itself, inside
the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.processing_utils import ImagesKwargs

from moe_vision.modeling.configuration_moe_vision import SavesItsCode, from_plain
from moe_vision.registry import SLICING
from moe_vision.slicing.base import SlicingPolicy
from moe_vision.slicing.pictures import eight_bit
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

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One picture as [3, H, W], as the library makes it, but 16-bit grey scaled and not clipped."""
        picture = eight_bit(image) if isinstance(image, Image.Image) else image
        made: torch.Tensor = super().process_image(picture, *args, **kwargs)
        return made

    def _preprocess(  # type: ignore[override]
        self, images, do_rescale, rescale_factor, slicing, images_per_prompt, return_tensors, **kwargs
    ):  # fmt: skip
        """[3, H, W] each → pixel_values [V, 3, H, W] in [0, 1], views in the plans' order, smaller ones with zeros to
        their right and below; image_sizes [V, 3]: of each view's image height, width, images in the prompt.

        Pictures are in 0..255, or in 0..1 where `do_rescale` is false.
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
            picture = image if do_rescale else image.float() / rescale_factor  # colours to pad with are in 0..255
            for view in render(picture, plan.views):
                # Bicubic overshoots on float images; views are promised in [0, 1].
                views.append(self.rescale(view, rescale_factor).clamp(0, 1))
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
