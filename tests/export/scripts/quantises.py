"""torchao on the language model alone, the experts left as they are: logits beside fp32's, and after saving."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from folder import loaded, picture, prompt
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForImageTextToText, TorchAoConfig

FOLDER, OUTPUT = sys.argv[1], Path(sys.argv[2])
# Names count from their start: bare `vision_tower` would leave nothing out.
LEFT_OUT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
KINDS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}

torch.set_grad_enabled(False)
model, processor = loaded(FOLDER)
texts = [prompt(processor, "What is in the picture?"), prompt(processor, "How many?")]
inputs = processor(images=[picture(0), picture(1)], text=texts, padding=True, return_tensors="pt")


def logits(model: Any) -> torch.Tensor:
    """Those of tokens that are no padding."""
    found: torch.Tensor = model.eval()(**inputs).logits[inputs["attention_mask"].bool()]
    return found


def quantised(model: Any) -> list[str]:
    """Names of parameters that are no plain tensors any more."""
    return sorted(name for name, value in model.named_parameters() if type(value.data) is not torch.Tensor)


def compared(kind: str) -> dict[str, Any]:
    """What this kind of weights changes, and what saving and loading changes then."""
    kept = TorchAoConfig(KINDS[kind], modules_to_not_convert=LEFT_OUT)
    small = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True, quantization_config=kept)
    small.save_pretrained(OUTPUT / kind)
    again = AutoModelForImageTextToText.from_pretrained(OUTPUT / kind, trust_remote_code=True)
    found = logits(small)
    names = quantised(small)
    plain = {name: value for name, value in again.named_parameters() if name not in names}
    return {
        "error": ((found - expected).norm() / expected.norm()).item(),
        "quantised": names,
        "quantised_after_saving": quantised(again),
        "others_changed": [name for name, value in plain.items() if not torch.equal(value, weights[name])],
        "difference_after_saving": (logits(again) - found).abs().max().item(),
    }


expected = logits(model)
weights = dict(model.named_parameters())
layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
report = {kind: compared(kind) for kind in KINDS}
report["linear_layers"] = sorted(f"{name}.weight" for name in layers if name.startswith("model.language_model."))
print(json.dumps(report))
