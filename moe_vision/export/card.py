"""The model card of an exported folder: what it is made of, how well it does, how to load it."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.cost import SLICED_SIZE

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: other
tags:
- moe-vision
- custom_code
---

# A mixture of vision experts

A `{language}` language model of width {width} that sees through {count} vision experts, fused by
moe-vision: {parameters:.1f} M parameters, {tokens}.

## Vision experts

| name | family | variant | input | pretraining | licence of the weights |
|---|---|---|---|---|---|
{experts}

## Branches

| branch | mixer | adapter |
|---|---|---|
{branches}

The language model's weights keep their own licence, which this card does not know.
{results}
## Use

The code is in this folder, in `modeling_moe_vision.py`; it needs `torch`, `torchvision` and `transformers`
(5.16 or later), and `trust_remote_code=True` lets it run. Read it first.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/to/this/folder"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
{prompt}
inputs = processor(images=Image.open("picture.png"), text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""

CHAT_PROMPT = """
content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)"""


def model_card(
    model: MoeVisionForConditionalGeneration,
    processor: MoeVisionProcessor,
    metrics: Mapping[str, Any] | None,
) -> str:
    """Write the card as Markdown with the Hub's header; metrics may be nested."""
    vision = model.config.vision_config
    experts = [
        f"| {name} | {config.type_name} | {config.variant} | {config.size[0]} × {config.size[1]} px | "
        f"{config.spec.pretraining} | {config.spec.licence} |"
        for name, config in vision.expert_configs().items()
    ]
    branches = [
        f"| {name} | {described(branch['mixer'])} | {described(branch['adapter'])} |"
        for name, branch in vision.branches.items()
    ]
    plain_prompt = f'\ntext = "{processor.image_token} What is in the picture?"'
    return TEMPLATE.format(
        language=model.config.text_config.model_type,
        width=model.config.text_config.hidden_size,
        count=len(experts),
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        tokens=token_note(processor),
        experts="\n".join(experts),
        branches="\n".join(branches),
        results=results_table(metrics or {}),
        prompt=CHAT_PROMPT if processor.chat_template else plain_prompt,
    )


def token_note(processor: MoeVisionProcessor) -> str:
    """How many tokens an image becomes."""
    policy = processor.image_processor.policy
    tokens = processor.num_image_tokens(SLICED_SIZE)
    if policy.one_view:
        return f"{tokens} visual tokens per image"
    height, width = SLICED_SIZE
    return f"images sliced by `{policy.type_name}`, {tokens} visual tokens for one of {height}x{width} pixels"


def described(values: Mapping[str, Any]) -> str:
    """`type` (key value, …) of a mixer or adapter."""
    choices = ", ".join(f"{key} {value}" for key, value in values.items() if key != "type")
    return f"`{values['type']}`" + (f" ({choices})" if choices else "")


def results_table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in leaves(metrics)]
    return "\n".join(["", "## Results", "", "| metric | value |", "|---|---|", *rows, ""]) if rows else ""


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and printed values of the numbers and strings in nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif isinstance(value, (int, str)):
            yield f"{prefix}{name}", str(value)
