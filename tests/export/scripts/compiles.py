"""torch.compile of the vision tower and of the whole model, each in one graph: results beside eager's."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from folder import loaded, picture, prompt
from torch._dynamo.testing import CompileCounterWithBackend

FOLDER = sys.argv[1]
# Traces and differentiates as the default backend does, and leaves out its kernels, whose making takes minutes.
BACKEND = "aot_eager"

torch.set_grad_enabled(False)
model, processor = loaded(FOLDER)
texts = [prompt(processor, "What is in the picture?"), prompt(processor, "How many?")]
inputs = processor(images=[picture(0), picture(1)], text=texts, padding=True, return_tensors="pt")
real = inputs["attention_mask"].bool()


def compared(module: torch.nn.Module, output: Callable[[Any], torch.Tensor]) -> dict[str, float]:
    """Largest difference between the outputs of the compiled module and of itself, and the graphs that it took."""
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    difference = (output(compiled) - output(module)).abs().max().item()
    return {"difference": difference, "graphs": counter.frame_count, "operations": counter.op_count}


report = {
    "tower": compared(model.model.vision_tower, lambda tower: tower(inputs["pixel_values"]).data),
    "model": compared(model, lambda whole: whole(**inputs).logits[real]),
}
print(json.dumps(report))
