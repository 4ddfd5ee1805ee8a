"""FOLDER: every way to generate, each beside the plainest one. Prints JSON."""

import json
import sys
from typing import Any

import torch
from folder import loaded, picture, prompt
from transformers import TextIteratorStreamer

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def answers(model: Any, processor: Any, texts: list[str], images: list[list[Any]], **options: Any) -> list[list[int]]:
    """New tokens of each prompt of a batch."""
    flat = [image for own in images for image in own]
    inputs = processor(images=flat or None, text=texts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    output = model.generate(**inputs, **{**GREEDY, **options})
    return output[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def score(model: Any, processor: Any, text: str, images: list[Any], new: list[int]) -> float:
    """Mean log-probability of an answer, by one forward pass over prompt and answer, as beams are ranked."""
    inputs = processor(images=images, text=[text], return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([new])], dim=1)
    rest = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **rest).logits
    chosen = logits[0, -len(new) - 1 : -1].log_softmax(-1)
    return chosen.gather(1, torch.tensor(new)[:, None]).mean().item()


def main(folder: str) -> None:
    model, processor = loaded(folder)
    texts = [prompt(processor, "What is this?"), prompt(processor, "Which is red?", 2), prompt(processor, "Hello", 0)]
    images = [[picture(0)], [picture(1), picture(2)], []]
    singles = [answers(model, processor, [text], [own])[0] for text, own in zip(texts, images, strict=True)]
    batch = answers(model, processor, texts, images)
    swapped = answers(model, processor, [texts[1]], [images[1][::-1]])
    inputs = processor(images=images[1], text=[texts[1]], return_tensors="pt")
    beams = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, num_beams=3, num_return_sequences=3, length_penalty=1.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    rescored = [score(model, processor, texts[1], images[1], row[length:].tolist()) for row in beams.sequences]
    sampling = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
    drawn = [answers(model, processor, texts[:1], images[:1], **sampling) for _ in range(2)]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    one = processor(images=images[0], text=texts[:1], return_tensors="pt")
    model.generate(**one, **GREEDY, streamer=streamer)
    with torch.inference_mode():
        tokens = model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        ).pooler_output  # fmt: skip
        order = model(**inputs).logits[0, -1]
        other_order = model(**processor(images=images[1][::-1], text=[texts[1]], return_tensors="pt")).logits[0, -1]
    faults = {}
    for name, wrong in {
        "one image too few": {"pixel_values": inputs["pixel_values"][:1], "image_sizes": inputs["image_sizes"][:1]},
        "cut through an image": {"input_ids": inputs["input_ids"][:, :4], "attention_mask": None},
    }.items():
        try:
            model(**{**inputs, **wrong})
            faults[name] = "nothing was raised"
        except ValueError as error:
            faults[name] = str(error)
    print(json.dumps({
        "singles": singles, "batch": batch, "swapped": swapped[0],
        "uncached": answers(model, processor, texts, images, use_cache=False),
        "static": answers(model, processor, texts[:2], images[:2], cache_implementation="static"),
        "beams": answers(model, processor, texts, images, num_beams=3),
        "single_beams": [answers(model, processor, [text], [own], num_beams=3)[0]
                         for text, own in zip(texts, images, strict=True)],
        "beam_scores": beams.sequences_scores.tolist(), "rescored": rescored,
        "drawn": drawn, "streamed": "".join(streamer),
        "decoded": processor.tokenizer.decode(singles[0], skip_special_tokens=True),
        "placeholders": int((inputs["input_ids"] == model.config.image_token_id).sum()),
        "image_tokens": [len(own) for own in tokens],
        "order_changes_logits": (order - other_order).abs().max().item(), "faults": faults,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
