"""Layers on disk and activations that are made again: logits and gradients beside those of the model as it is."""

import json
import sys
from collections import Counter
from typing import Any

import torch
from folder import loaded, picture, prompt
from transformers import AutoModelForImageTextToText

FOLDER, DISK = sys.argv[1], sys.argv[2]
WAYS = ("gradient_checkpointing_enable", "activation_checkpointing_enable")

model, processor = loaded(FOLDER)
texts = [prompt(processor, "What is in the picture?"), prompt(processor, "How many?")]
inputs = processor(images=[picture(0), picture(1)], text=texts, padding=True, return_tensors="pt")
real = inputs["attention_mask"].bool()
with torch.no_grad():
    logits = model(**inputs).logits


def another(**options: Any) -> Any:
    """The model once more."""
    return AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True, **options).eval()


def size(name: str) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.get_submodule(name).parameters())


def placed(**options: Any) -> dict[str, Any]:
    """How far the logits are from the model's own with this placement, and which decoder layers lie on disk."""
    other = another(device_map="auto", **options)
    places = getattr(other, "hf_device_map", {})
    with torch.no_grad():
        difference = (other(**inputs).logits - logits).abs()[real].max().item()
    return {"difference": difference, "on_disk": [name for name, place in places.items() if place == "disk"]}


def gradients(way: str | None) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Of every parameter, and how many convolutions and linear layers ran twice, by expert or language model."""
    trained = another().train()
    if way is not None:
        getattr(trained, way)()
    calls: Counter[str] = Counter()
    for name, module in trained.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_pre_hook(lambda module, arguments, name=name: calls.update([name]))
    labels = inputs["input_ids"].masked_fill(~real, -100)
    trained(**inputs, labels=labels).loss.backward()
    twice = [name.removeprefix("model.").removeprefix("vision_tower.experts.") for name in calls if calls[name] == 2]
    recomputed = Counter(name.split(".")[0] for name in twice)
    return {name: parameter.grad for name, parameter in trained.named_parameters()}, recomputed


first_layers = sum(
    size(name) for name in ("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens")
)
budget = first_layers + int(2.5 * size("model.language_model.layers.0"))  # one must be free for those on disk
report: dict[str, Any] = {
    "automatic": placed(),
    "on_disk": placed(max_memory={"cpu": budget}, offload_folder=DISK),
    "experts": list(model.model.vision_tower.experts),
}
expected, twice = gradients(None)
report["without"] = {"recomputed": twice, "missing": [name for name, value in expected.items() if value is None]}
report["ways"] = [way for way in WAYS if hasattr(model, way)]  # the second is transformers 5.23's name of the first
for way in report["ways"]:
    found, twice = gradients(way)
    differences = [(found[name] - expected[name]).abs().max() / expected[name].abs().max() for name in expected]
    report[way] = {"difference": torch.stack(differences).max().item(), "recomputed": twice}
print(json.dumps(report))
