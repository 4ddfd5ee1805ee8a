"""Text and images → model inputs: every image marker becomes as many placeholders as the image has tokens."""

from typing import Any

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from moe_vision.modeling.configuration_moe_vision import SavesItsCode
from moe_vision.modeling.special_tokens import with_special_tokens_once
from moe_vision.slicing.plan import Size


class MoeVisionProcessor(SavesItsCode, ProcessorMixin):
    """The image marker is the tokenizer's own `image_token`; the image processor's plan says what it becomes."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """As `ProcessorMixin.__call__`. Empty lists of images, videos and audio count as none. The tokenizer's special
        tokens are added once: not to a text that begins with them, as those of a chat template do.
        """
        kwargs = {key: value for key, value in kwargs.items() if key != "audios" or value}
        images = None if isinstance(images, (list, tuple)) and not any_image(images) else images
        if text is not None:
            text, kwargs = self.with_special_tokens(text, kwargs)
        if images is not None and text is not None:
            texts = [text] if isinstance(text, str) else text
            counts = [prompt.count(self.image_token) for prompt in texts]
            check_images(images, counts)
            given = {**kwargs.get("images_kwargs", {}), "images_per_prompt": [n for n in counts for _ in range(n)]}
            kwargs = {**kwargs, "images_kwargs": given}
        return super().__call__(images=images, text=text, videos=videos or None, audio=audio or None, **kwargs)

    def with_special_tokens(self, text: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Text and options with which the tokenizer adds its special tokens once, unless the caller wants none."""
        texts = [text] if isinstance(text, str) else text
        nested = kwargs.get("text_kwargs", {})
        wanted = kwargs.get("add_special_tokens", nested.get("add_special_tokens", True))
        if not wanted or not all(isinstance(prompt, str) for prompt in texts):
            return text, kwargs
        prompts, add = with_special_tokens_once(texts, self.tokenizer)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("add_special_tokens", "text_kwargs")}
        options = {**nested, "add_special_tokens": add}
        return (prompts[0] if isinstance(text, str) else prompts), {**kwargs, "text_kwargs": options}

    def num_image_tokens(self, size: Size, images: int = 1) -> int:
        """Placeholders of an image of `size` (height, width), one of `images` in its prompt."""
        return self.image_processor.plan(size, images).num_tokens

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_image_tokens"]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Placeholders of image `image_idx`."""
        return self.image_token * int(image_inputs["num_image_tokens"][image_idx])

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and rows of pixel_values for one prompt's images of these sizes (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        plans = [self.image_processor.plan((height, width), len(image_sizes)) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[plan.num_tokens for plan in plans], num_image_patches=[len(plan.views) for plan in plans]
        )


def check_images(images: Any, counts: list[int]) -> None:
    """Raises ValueError where images are listed by prompt, and a prompt marks another number than it has."""
    if not isinstance(images, (list, tuple)) or len(images) != len(counts):
        return
    for index, (own, count) in enumerate(zip(images, counts, strict=True)):
        if isinstance(own, (list, tuple)) and len(own) != count:
            raise ValueError(f"prompt {index} marks {count} images and has {len(own)}: give each prompt its own")


def any_image(images: Any) -> bool:
    """Whether a list of images, or a list of such lists, holds any."""
    return any(any_image(item) if isinstance(item, (list, tuple)) else item is not None for item in images)
