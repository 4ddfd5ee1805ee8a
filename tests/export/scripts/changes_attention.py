"""Each attention implementation, asked for on loading and afterwards: logits beside eager's."""

import json
import sys
from typing import Any

import torch
from folder import loaded, picture, prompt
from transformers import AutoModelForImageTextToText
from transformers.integrations.flex_attention import BlockMask

FOLDER = sys.argv[1]

# Flex attention's own kernel takes a minute to compile. Its unfused form has the same masks and the same result.
torch.compiler.set_stance("force_eager")
torch.set_grad_enabled(False)


def logits(model: Any, inputs: Any) -> tuple[torch.Tensor, bool]:
    """Those of tokens that are no padding, and whether the language model's attention got a flex attention's mask."""
    masks = []
    attention = model.model.language_model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    output = model(**inputs).logits[inputs["attention_mask"].bool()]
    hook.remove()
    return output, isinstance(masks[0], BlockMask)


def model_with(implementation: str) -> Any:
    """The model, loaded with this implementation."""
    return AutoModelForImageTextToText.from_pretrained(
        FOLDER, trust_remote_code=True, attn_implementation=implementation
    ).eval()


def refused(load: Any) -> bool:
    """Whether flash attention, which is not installed, ends in an ImportError that names it."""
    try:
        load()
    except ImportError as error:
        return "FlashAttention2" in str(error)
    return False


eager, processor = loaded(FOLDER, attn_implementation="eager")
texts = [prompt(processor, "What is in the picture?"), prompt(processor, "How many?", 2)]
inputs = processor(images=[picture(0), picture(1), picture(2)], text=texts, padding=True, return_tensors="pt")
expected, _ = logits(eager, inputs)


def compared(model: Any) -> dict[str, Any]:
    """How far the largest logit is from eager's, relative to the largest of all; what the model runs on."""
    found, flex = logits(model, inputs)
    return {
        "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
        "implementation": model.config.text_config._attn_implementation,
        "flex": flex,
    }


report: dict[str, Any] = {
    "loaded": {name: compared(model_with(name)) for name in ("sdpa", "flex_attention")},
    "flash_refused": {
        "loading": refused(lambda: model_with("flash_attention_2")),
        "setting": refused(lambda: eager.set_attn_implementation("flash_attention_2")),
    },
    "changed": [],
}
for name in ("sdpa", "flex_attention", "eager", "flex_attention", "sdpa", "eager"):  # from each to each
    eager.set_attn_implementation(name)
    report["changed"].append(compared(eager))
print(json.dumps(report))
