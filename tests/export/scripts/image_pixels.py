"""Digests of pixel values of image files by every way into an exported processor."""

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, pipeline
from transformers.utils.chat_template_utils import Chat

FOLDER, IMAGES = sys.argv[1:]


def digest(inputs: Any) -> str:
    """Of pixel_values, as 32-bit floats."""
    return hashlib.sha256(inputs["pixel_values"].to(torch.float32).numpy().tobytes()).hexdigest()


def turn(**image: Any) -> list[dict[str, Any]]:
    """A chat about an image."""
    return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "what is it"}]}]


processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
pipe = pipeline("image-text-to-text", model=FOLDER, trust_remote_code=True)

report: dict[str, dict[str, str]] = {}
for path in sorted(Path(IMAGES).iterdir()):
    uri = f"data:image/x;base64,{base64.b64encode(path.read_bytes()).decode()}"
    chat = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with Image.open(path) as image:
        report[path.name] = {
            "image processor": digest(image_processor(image, return_tensors="pt")),
            "processor": digest(processor(images=image, text="<image>", return_tensors="pt")),
            "processor, path": digest(processor(images=str(path), text="<image>", return_tensors="pt")),
            "chat, Pillow": digest(processor.apply_chat_template(turn(image=image), **chat)),
            "chat, path": digest(processor.apply_chat_template(turn(path=str(path)), **chat)),
            "chat, URI": digest(processor.apply_chat_template(turn(url=uri), **chat)),
            "pipeline, Pillow": digest(pipe.preprocess(Chat(turn(image=image)))),
            "pipeline, path": digest(pipe.preprocess(Chat(turn(url=str(path))))),
        }
        # The pipeline's other form opens files itself, as plain RGB.
        if image.mode == "RGB" and "transparency" not in image.info:
            report[path.name]["pipeline, images"] = digest(pipe.preprocess({"images": str(path), "text": "<image>"}))

(Path(IMAGES) / "photo.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
try:
    processor(images=str(Path(IMAGES) / "photo.jpg"), text="<image>", return_tensors="pt")
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(json.dumps({"digests": report, "refusal": refusal}))
