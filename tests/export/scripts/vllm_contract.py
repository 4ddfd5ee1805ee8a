"""FOLDER…: what vLLM 0.33 does with a folder, step by step, without vLLM. Prints JSON, one entry a folder.

The steps are those of `--model-impl transformers` in the sources of vLLM 0.33.0: vllm/model_executor/models/registry.py
(`_try_resolve_transformers`) and, in models/transformers/ beside it, base.py and multimodal.py. `vllm_itself.py` runs
the real ones.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from folder import loaded, prompt
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SIZES = [(90, 140), (200, 64), (64, 64), (33, 500), (700, 90), (311, 312), (1000, 1000), (224, 448)]
LAYERS: list[int] = []
"""Of every call of the attention function, the layer that made it."""


def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """As `vllm_attention_forward`: one sequence, causal whatever the mask says, tokens first."""
    LAYERS.append(module.layer_idx)
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
    )
    return output[0].transpose(0, 1).reshape(query.shape[-2], -1), None


class Replicated(nn.Module):
    """What is left of a linear layer in vLLM: weight and bias, and no `in_features` or `out_features`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """As `init_on_device_without_buffers`: parameters have no values when they are made, buffers have."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), False))

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def replace_linear_layers(module: nn.Module) -> int:
    """Put `Replicated` in place of every linear layer; how many there were."""
    number = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Replicated(child))
            number += 1
        else:
            number += replace_linear_layers(child)
    return number


def init_parameters(model: nn.Module) -> None:
    """Memory for the parameters; what no weight fills shows."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"), False))


def load_weights(model: nn.Module, head: dict[str, torch.Tensor], folder: str) -> dict[str, list[str]]:
    """Load the folder's weights by the names that `_create_hf_to_vllm_mapper` gives them. What has no place, and which
    places got nothing. Of what is not in the base model, vLLM knows `lm_head.weight`.
    """
    children = "|".join(name for name, _ in [*model.named_children(), *model.named_parameters(recurse=False)])
    places = {f"model.{name}": value for name, value in model.state_dict().items()}
    unknown, filled = [], set()
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, value in load_file(file).items():
            found = re.sub(rf"^(?!model\.)(({children}).*)", r"model.\1", name)
            found = re.sub(rf"^(model\.)((?!{children}).+)", r"\2", found)
            if found == "lm_head.weight":
                head["weight"] = value
            elif found in places:
                places[found].copy_(value)
                filled.add(found)
            else:
                unknown.append(name)
    return {"unknown": unknown, "unfilled": sorted({*places} - filled)}


def processed(processor: Any, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What `_apply_hf_processor_main` and `_get_field_config` keep of each image: its placeholders and its tensors."""
    images = [picture(size) for size in sizes]
    made = processor(
        text=processor.image_token * len(images), images=images, return_tensors="pt",
        return_text_replacement_offsets=True,
    )  # fmt: skip
    offsets = made.pop("text_replacement_offsets")[0]
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids", "input_ids"):
        made.pop(name, None)
    encode = processor.tokenizer.encode
    items = [{"placeholders": encode(entry["replacement"], add_special_tokens=False)} for entry in offsets]
    patches = list(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_patches"])
    if len(items) != len(sizes) or len(made["pixel_values"]) != sum(patches):
        raise ValueError(f"{len(items)} offsets and {len(made['pixel_values'])} rows for images of {patches} rows")
    for name, data in made.items():
        by_column = data.ndim > 1 and data.shape[0] != sum(patches) and data.shape[1] == sum(patches)
        start = 0
        for item, number in zip(items, patches, strict=True):
            rows = slice(start, start + number)
            item[name] = data[:, rows] if by_column else data[rows]
            start += number
    return items


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """As `MultiModalFlatField`: one after the other, smaller ones with zeros behind."""
    sides = [max(part.shape[i] for part in parts) for i in range(1, parts[0].ndim)]
    output = parts[0].new_zeros(sum(len(part) for part in parts), *sides)
    start = 0
    for part in parts:
        output[(slice(start, start + len(part)), *(slice(side) for side in part.shape[1:]))] = part
        start += len(part)
    return output


def encoded(model: Any, items: list[dict[str, Any]]) -> list[torch.Tensor]:
    """As `_process_image_input`: the images' tokens, of as many images as were given."""
    inputs = {name: joined([item[name] for item in items]) for name in items[0] if name != "placeholders"}
    tokens = model.get_image_features(inputs.pop("pixel_values"), return_dict=True, **inputs).pooler_output
    if torch.is_tensor(tokens) or len(tokens) != len(items):
        raise ValueError(f"pooler_output of {len(items)} images is no list of as many")
    return list(tokens)


def picture(size: tuple[int, int]) -> Image.Image:
    noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(size[0]), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def spread(processor: Any, text: str, items: list[dict[str, Any]]) -> torch.Tensor:
    """Ids of a prompt in which each image's placeholders stand where its marker stood."""
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    waiting = iter(items)
    spread = [next(waiting)["placeholders"] if i == processor.image_token_id else [i] for i in ids]
    return torch.tensor([i for part in spread for i in part])


def profiled(processor: Any) -> dict[str, Any]:
    """The size that `get_image_size_with_most_features` finds, and its tokens."""

    def count(side: int) -> int:
        number: int = processor._get_num_multimodal_tokens(image_sizes=([side, side],))["num_image_tokens"][0]
        return number

    given = getattr(processor.image_processor, "size", None) or {}
    side = 10_000 if not given else max(given["height"], given["width"], key=count)
    most = count(side)
    while side // 2 >= 224 and count(side // 2) == most:
        side //= 2
    return {"side": side, "tokens": most}


def examined(folder: str) -> dict[str, Any]:
    """Everything that vLLM asks of a folder, by name."""
    ALL_ATTENTION_FUNCTIONS.register("vllm", attention)
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    text_config = config.get_text_config()
    first = next(value for name, value in config.auto_map.items() if name.startswith("AutoModel"))
    resolved: Any = get_class_from_dynamic_module(first, folder)
    text_config._attn_implementation = "vllm"
    options = {"config": config, "dtype": torch.float32, "trust_remote_code": True}
    try:
        with torch.device("meta"):
            sketch = AutoModel.from_config(**options)
    except ValueError as error:
        return {"refused": str(error)}
    with parameters_on_meta():
        model = AutoModel.from_config(**options).eval()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = [pattern for pattern in model.tp_plan if pattern != "lm_head"]
    sharded = [name for name in linear if any(re.match(pattern, name) for pattern in plan)]
    replaced = replace_linear_layers(model)
    init_parameters(model)
    head: dict[str, torch.Tensor] = {}
    names = load_weights(model, head, folder)
    tied = config.tie_word_embeddings or getattr(text_config, "tie_word_embeddings", False)
    whole, processor = loaded(folder)

    alone = [processed(processor, [size])[0] for size in SIZES]
    items = processed(processor, SIZES[:3])
    counted = processor._get_num_multimodal_tokens(image_sizes=SIZES[:3])["num_image_tokens"]
    with torch.inference_mode():
        tokens = encoded(model, items)
        one_by_one = [encoded(model, [item])[0] for item in items]
        two_requests = encoded(model, [alone[0], *items])
        calls_by_experts = len(LAYERS)
        text = prompt(processor, "What is this?", 3)
        ids = spread(processor, text, items)
        inputs = processor(text=text, images=[picture(size) for size in SIZES[:3]], return_tensors="pt")
        embeddings = model.get_input_embeddings()(ids)
        embeddings[ids == processor.image_token_id] = torch.cat(tokens)
        output = model(
            input_ids=None, inputs_embeds=embeddings[None], use_cache=False, position_ids=torch.arange(len(ids))[None],
            return_dict=False,
        )  # fmt: skip
        weight = model.get_input_embeddings().weight if tied else head["weight"]
        logits = F.linear(output[0][0], weight)
        expected = whole(**inputs).logits[0]
    return {
        "resolved": resolved.__name__, "is_model": issubclass(resolved, PreTrainedModel),
        "compatible": resolved.is_backend_compatible(), "multimodal": config != text_config,
        "base": type(model).__name__, "same_class": type(sketch) is resolved,
        "head_in_base": [name for name, _ in model.named_modules() if "lm_head" in name],
        "decoder": type(model.get_decoder()).__name__, "decoder_is_language_model":
        model.get_decoder() is model.language_model,
        "encoder": type(model.get_encoder(modality="image")).__name__,
        "linear_layers": replaced, "sharded": len(sharded), "sharded_outside":
        [name for name in sharded if not name.startswith("language_model.")],
        "head_plan": type(whole)._tp_plan.get("lm_head"), "pipeline": sorted(model._pp_plan or {}),
        **names, "head_saved": "weight" in head, "tied": tied,
        "modalities": [name for name in ("image", "video", "audio") if hasattr(processor, f"{name}_processor")],
        "counted": [
            [len(item["placeholders"]), len(item["pixel_values"]),
             *(values[0] for values in (made["num_image_tokens"], made["num_image_patches"]))]
            for size, item in zip(SIZES, alone, strict=True)
            for made in [processor._get_num_multimodal_tokens(image_sizes=[size])]
        ],
        "together": [[len(item["placeholders"]), number, len(part)]
                     for item, number, part in zip(items, counted, tokens, strict=True)],
        "width": [tokens[0].shape[1], text_config.hidden_size], "profiled": profiled(processor),
        "items": sorted({name for item in alone for name in item}),
        "difference_alone": distance(one_by_one, tokens), "difference_beside": distance(two_requests[1:], tokens),
        "calls_by_experts": calls_by_experts, "calls": LAYERS[calls_by_experts:], "layers":
        text_config.num_hidden_layers, "tuple": isinstance(output, tuple),
        "same_ids": ids.tolist() == inputs["input_ids"][0].tolist(),
        "difference": (logits - expected).abs().max().item(), "scale": expected.abs().max().item(),
    }  # fmt: skip


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


def main(*folders: str) -> None:
    seen = []
    for folder in folders:
        LAYERS.clear()
        seen.append(examined(folder))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
