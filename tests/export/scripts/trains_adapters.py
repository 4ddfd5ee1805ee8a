"""LoRA on the language model: losses of a few steps; logits of the adapters that were saved, and of merged weights."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from folder import loaded, picture, prompt
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

FOLDER, OUTPUT = Path(sys.argv[1]), Path(sys.argv[2])
LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

torch.manual_seed(0)
model, processor = loaded(str(FOLDER))
start = {name: value.clone() for name, value in model.state_dict().items()}
texts = [
    prompt(processor, "What is in the picture?") + "a red circle</s>",
    prompt(processor, "How many?") + "three</s>",
]
inputs = processor(images=[picture(0), picture(1)], text=texts, padding=True, return_tensors="pt")
real = inputs["attention_mask"].bool()
labels = inputs["input_ids"].masked_fill(~real, -100)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Those of tokens that are no padding."""
    found: torch.Tensor = model.eval()(**inputs).logits[real]
    return found


plain = logits(model)
adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, task_type="CAUSAL_LM")).train()
optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
losses = []
for _ in range(3):
    loss = adapted(**inputs, labels=labels).loss
    loss.backward()
    with_gradient = sorted(name for name, value in adapted.named_parameters() if value.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

trained = logits(adapted)
adapted.save_pretrained(OUTPUT / "adapters")
another = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
onto_model = PeftModel.from_pretrained(another, OUTPUT / "adapters")
by_auto_class = AutoModelForImageTextToText.from_pretrained(OUTPUT / "adapters", trust_remote_code=True)

merged = adapted.merge_and_unload()
merged.save_pretrained(OUTPUT / "merged")
processor.save_pretrained(OUTPUT / "merged")
again, _ = loaded(str(OUTPUT / "merged"))
changed = sorted(name for name, value in again.state_dict().items() if not torch.equal(value, start[name]))
layers = {name: module for name, module in again.named_modules() if isinstance(module, torch.nn.Linear)}

report = {
    "losses": losses,
    "with_gradient": with_gradient,
    "learnt": (trained - plain).abs().max().item(),
    "differences": {
        "adapters on the model": (logits(onto_model) - trained).abs().max().item(),
        "adapters by Auto class": (logits(by_auto_class) - trained).abs().max().item(),
        "merged": (logits(merged) - trained).abs().max().item(),
        "merged and saved": (logits(again) - trained).abs().max().item(),
    },
    "changed": changed,
    "linear_layers": sorted(f"{name}.weight" for name in layers if name.startswith("model.language_model.")),
    "same_code": (FOLDER / "modeling_moe_vision.py").read_bytes()
    == (OUTPUT / "merged" / "modeling_moe_vision.py").read_bytes(),
    "auto_maps": [
        json.loads((folder / "config.json").read_text())["auto_map"] for folder in (FOLDER, OUTPUT / "merged")
    ],
}
print(json.dumps(report))
