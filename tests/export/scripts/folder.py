"""What every script shares: the folder's model and processor, a picture, and prompts in its chat template."""

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def loaded(folder: str, **options: Any) -> tuple[Any, Any]:
    """Model and processor, by remote code."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()
    return model, processor


def picture(number: int = 0) -> Image.Image:
    """[90, 120] pixels of noise, another one for each number."""
    noise = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def prompt(processor: Any, question: str, images: int = 1) -> str:
    """A user's turn with so many images, ready to be answered."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text
