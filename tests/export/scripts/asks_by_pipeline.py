"""pipeline() and chat templates on every form in which people hand over pictures: answers beside generate()'s own."""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from folder import picture, prompt
from PIL import Image
from transformers import pipeline

FOLDER = sys.argv[1]
TASK = "image-text-to-text"
LENGTH = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
QUESTION = "What is in the picture?"


def own_answer(model: Any, processor: Any, text: str, images: list[Image.Image]) -> str:
    """What generate() itself says."""
    inputs = processor(images=images, text=text, return_tensors="pt")
    output = model.generate(**inputs, **LENGTH)
    answer: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def chat(*images: dict[str, Any]) -> list[dict[str, Any]]:
    """A user's turn with these pictures."""
    return [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]


def answers(pipe: Any, chats: list[Any], **options: Any) -> list[str]:
    """What the pipeline says to each chat."""
    outputs = pipe(text=chats, return_full_text=False, generate_kwargs=LENGTH, **options)
    return [output[0]["generated_text"] for output in outputs]


def masked_conversation(processor: Any) -> dict[str, Any]:
    """Two answers across two pictures: what the template's mask calls the assistant's words."""
    turns = []
    for number, answer in enumerate(["a red circle", "no, two rows of 12 squares"]):
        turns += chat({"type": "image", "image": picture(number)})
        turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    inputs = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    mask = torch.as_tensor(inputs["assistant_masks"]).bool()
    return {
        "names": sorted(inputs.keys()),
        "images": len(inputs["pixel_values"]),
        "image_tokens": int((inputs["input_ids"] == processor.image_token_id).sum()),
        "expected_image_tokens": 2 * processor.num_image_tokens((90, 120)),
        "assistant": processor.tokenizer.decode(inputs["input_ids"][mask]),
    }


pipe = pipeline(TASK, model=FOLDER, trust_remote_code=True)
model, processor = pipe.model, pipe.processor
first, second = picture(0), picture(1)
stored = io.BytesIO()
first.save(stored, "PNG")
Path("picture.png").write_bytes(stored.getvalue())
encoded = base64.b64encode(stored.getvalue()).decode()

one_image = prompt(processor, QUESTION)
expected = {
    "one": own_answer(model, processor, one_image, [first]),
    "two": own_answer(model, processor, prompt(processor, QUESTION, 2), [first, second]),
    "none": own_answer(model, processor, prompt(processor, QUESTION, 0), []),
    "prefilled": own_answer(model, processor, one_image + "There is a", [first]),
    "bare": own_answer(model, processor, f"<image>{QUESTION}", [first]),
}
forms: dict[str, tuple[str, list[Any]]] = {
    "PIL image": ("one", chat({"type": "image", "image": first})),
    "path": ("one", chat({"type": "image", "path": "picture.png"})),
    "base64": ("one", chat({"type": "image", "base64": encoded})),
    "data URI": ("one", chat({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})),
    "two images": ("two", chat({"type": "image", "image": first}, {"type": "image", "image": second})),
    "text only": ("none", chat()),
    "string content": ("none", [{"role": "user", "content": QUESTION}]),
    "prefill": (
        "prefilled",
        [
            *chat({"type": "image", "image": first}),
            {"role": "assistant", "content": [{"type": "text", "text": "There is a"}]},
        ],
    ),
}
found = {form: [answers(pipe, [turns])[0], expected[meant]] for form, (meant, turns) in forms.items()}

batch = answers(pipe, [forms["PIL image"][1], forms["two images"][1], forms["path"][1]], batch_size=2)
found |= {f"batch of two, item {i}": [batch[i], expected[meant]] for i, meant in enumerate(["one", "two", "one"])}

bare = pipe(images=first, text=f"<image>{QUESTION}", return_full_text=False, generate_kwargs=LENGTH)
found["images and text"] = [bare[0]["generated_text"], expected["bare"]]

any_to_any = pipeline("any-to-any", model=FOLDER, trust_remote_code=True)
found["any-to-any"] = [answers(any_to_any, [forms["PIL image"][1]])[0], expected["one"]]

half = pipeline(TASK, model=FOLDER, trust_remote_code=True, dtype=torch.bfloat16)
found["bfloat16"] = [
    answers(half, [forms["PIL image"][1]])[0],
    own_answer(half.model, processor, one_image, [first]),
]

try:
    pipe(images=first, text=QUESTION)
    refusal = ""
except ValueError as error:
    refusal = str(error)

report = {
    "answers": found,
    "expected": expected,
    "half_dtype": str(half.model.dtype),
    "refusal": refusal,
    "conversation": masked_conversation(processor),
}
print(json.dumps(report))
