"""Text and images → model inputs: every image marker becomes as many placeholders as the image has visual tokens."""

from typing import Any

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData


class MoeVisionProcessor(ProcessorMixin):
    """num_image_tokens: visual tokens of one image. The image marker is the tokenizer's own `image_token`."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 0,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """As `ProcessorMixin.__call__`; empty lists of images, videos and audio count as none."""
        kwargs = {key: value for key, value in kwargs.items() if key != "audios" or value}
        images = None if isinstance(images, (list, tuple)) and not any_image(images) else images
        return super().__call__(images=images, text=text, videos=videos or None, audio=audio or None, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Placeholders of image `image_idx`."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and rows of pixel_values for images of these sizes (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def any_image(images: Any) -> bool:
    """Whether a list of images, or a list of such lists, holds any."""
    return any(any_image(item) if isinstance(item, (list, tuple)) else item is not None for item in images)
