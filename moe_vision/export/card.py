"""The model card of an exported folder: what it is made of, how well it does, how to load it."""

import json
import numbers
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_vision.config import read_yaml
from moe_vision.experts import ExpertConfig
from moe_vision.export.markdown import code, one_line, plain
from moe_vision.files import read_json
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
{training}{results}
## Intended use

Research on vision experts in multimodal language models: questions about pictures, answered in text. The licences of
the weights above bind together: what one of them forbids is forbidden for the whole.

## Limits

- Answers can be wrong, and read as sure as right ones; nothing here was tested for bias or safety.
- It knows what its training showed it: the languages, kinds of pictures and questions of the data above.
- Prompt, pictures and answer share a context of {context} tokens.

## Use

The code is in this folder, in `modeling_moe_vision.py`; it needs {packages},
and `trust_remote_code=True` lets it run. Read it first.

```python
# pip install {install}
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
    training: str | None = None,
) -> str:
    """Write the card as Markdown with the Hub's header; metrics may be nested, training is its section's text."""
    vision = model.config.vision_config
    experts = [
        f"| {plain(name)} | {plain(config.type_name)} | {plain(config.variant)} | "
        f"{config.size[0]} × {config.size[1]} px | {plain(config.spec.pretraining)} | {plain(config.spec.licence)} |"
        for name, config in vision.expert_configs().items()
    ]
    branches = [
        f"| {plain(name)} | {described(branch['mixer'])} | {described(branch['adapter'])} |"
        for name, branch in vision.branches.items()
    ]
    packages = needed_packages(vision.expert_configs().values())
    plain_prompt = f"\ntext = {json.dumps(processor.image_token + ' What is in the picture?')}"
    return TEMPLATE.format(
        language=one_line(model.config.text_config.model_type).replace("`", ""),
        width=model.config.text_config.hidden_size,
        count=len(experts),
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        tokens=token_note(processor),
        experts="\n".join(experts),
        branches="\n".join(branches),
        training=f"\n## Training\n\n{training or UNKNOWN_TRAINING}\n",
        results=results_table(metrics or {}),
        context=getattr(model.config.text_config, "max_position_embeddings", "the language model's own number of"),
        packages=", ".join(f"`{name}`" + (" (5.16 or later)" if name == "transformers" else "") for name in packages),
        install=" ".join(packages),
        prompt=CHAT_PROMPT if processor.chat_template else plain_prompt,
    )


def needed_packages(experts: Iterable[ExpertConfig]) -> list[str]:
    """Packages that an exported folder imports: every model's, and those of its experts."""
    every = ("torch", "torchvision", "transformers", "pillow")
    return list(dict.fromkeys([*every, *(package for expert in experts for package in expert.packages)]))


UNKNOWN_TRAINING = "The folder that was exported does not say how it was trained."


def training_of(run: Path) -> str | None:
    """Stages and data of a training's output as Markdown; None where it holds no schedule. Raises ValueError where its
    files are not as training wrote them."""
    file, report = run / "config.yaml", run / "data_report.json"
    if not file.exists():
        return None
    schedule = read_yaml(file)
    counts = read_json(report, "data report") if report.exists() else {}
    try:
        return training_text(schedule, counts)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"'{file}' and '{report.name}' beside it are not as a training writes them ({type(error).__name__}: "
            f"{one_line(error)}): restore them, or move the model's folder away from them"
        ) from error


def training_text(schedule: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """A resolved train config, and what became of its data, as Markdown."""
    rows = [
        f"| {plain(stage['name'])} | {trained_in(stage)} | {data_name(stage['data'])} | "
        f"{records_of(stage['name'], counts)} | {length_of(stage)} | {plain(stage['batch_size'])} |"
        for stage in schedule["stages"]
    ]
    language = without_folders(schedule["model"]["language_model"]["pretrained"] or "random weights")
    seed = f"Seed {plain(schedule['seed'])}."
    header = "| stage | trains, at which rate | data | records | length | batch size |\n|---|---|---|---|---|---|"
    return "\n".join([f"Language model before training: {code(language)}. {seed}", "", header, *rows])


def trained_in(stage: Mapping[str, Any]) -> str:
    """Groups and learning rates."""
    if stage["prealign"] is not None:
        rates = {"each expert by itself": stage["prealign"]["expert"], "its projector": stage["prealign"]["projector"]}
        return ", ".join(f"{plain(group)} {rate:g}" for group, rate in rates.items())
    turns = [stage["train"]] if stage["train"] is not None else [turn["train"] for turn in stage["alternate"]]
    groups = [", ".join(f"{plain(group)} {rate:g}" for group, rate in turn.items()) for turn in turns]
    return "; in turn with ".join(groups) + (" (LoRA)" if stage["lora"] is not None else "")


def data_name(data: Mapping[str, Any] | None) -> str:
    """What the data is called."""
    if data is None:
        return "given on the command line"
    if data.get("mixture") is not None:
        return ", ".join(data_name(source) for source in data["mixture"])
    if data.get("synthetic") is not None:
        return f"generated {plain(data['synthetic'])}"
    return code(without_folders(data.get("path") or data["dataset"]))


def without_folders(source: str) -> str:
    """A name on the Hub or in a package as it is; of a path, which would tell about the machine, the last part."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() else source


def records_of(stage: str, counts: Mapping[str, Any]) -> str:
    """Records that the stage's run used, of the first where there are several, which then see the same."""
    runs = [sources for name, sources in counts.items() if f"{name.split('-', 1)[1]}-".startswith(f"{stage}-")]
    return f"{sum(source['used'] for source in runs[0]):,}" if runs else ""


def length_of(stage: Mapping[str, Any]) -> str:
    return f"{plain(stage['max_steps'])} steps" if stage["max_steps"] is not None else f"{stage['epochs']:g} epochs"


def token_note(processor: MoeVisionProcessor) -> str:
    """How many tokens an image becomes."""
    policy = processor.image_processor.policy
    tokens = processor.num_image_tokens(SLICED_SIZE)
    if policy.one_view:
        return f"{tokens} visual tokens per image"
    height, width = SLICED_SIZE
    return f"images sliced by {code(policy.type_name)}, {tokens} visual tokens for one of {height}x{width} pixels"


def described(values: Mapping[str, Any]) -> str:
    """`type` (key value, …) of a mixer or adapter."""
    choices = ", ".join(f"{plain(key)} {plain(value)}" for key, value in values.items() if key != "type")
    return code(values["type"]) + (f" ({choices})" if choices else "")


def results_table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {plain(name)} | {plain(value)} |" for name, value in leaves(metrics)]
    return "\n".join(["", "## Results", "", "| metric | value |", "|---|---|", *rows, ""]) if rows else ""


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and printed values in nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            fraction = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
            printed = f"{value:.4g}" if fraction else str(value)
            yield f"{prefix}{name}", printed
