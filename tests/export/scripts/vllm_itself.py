"""FOLDER…: vLLM's own transformers backend on folders, on a CPU. Prints JSON, one entry a folder.

Its engine needs an accelerator: of it, the attention kernel is replaced, and so there is no cache and no scheduler. All
else is vLLM's: the choice of architecture, building and rewriting the model, loading weights, its processor with and
without cache, encoding, embedding and the head.
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import torch.nn.functional as F
from folder import loaded, prompt
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.renderers.hf import _detect_content_format
from vllm_contract import SIZES, distance, picture


def attention(layer: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """One causal sequence [T, heads * size], without a cache."""
    heads = [
        x.view(len(x), number, -1).transpose(0, 1)[None]
        for x, number in ((query, layer.num_heads), (key, layer.num_kv_heads), (value, layer.num_kv_heads))
    ]
    output = F.scaled_dot_product_attention(*heads, is_causal=True, scale=layer.impl.scale, enable_gqa=True)
    return output[0].transpose(0, 1).reshape(len(query), -1)


def encoded(model: Any, items: list[Any]) -> list[torch.Tensor]:
    """Images' tokens, of all images in one batch."""
    batches = group_and_batch_mm_kwargs([("image", item) for item in items])
    return [tokens for _, _, inputs in batches for tokens in model.embed_multimodal(**inputs)]


def examined(folder: str, start: bool) -> dict[str, Any]:
    """A folder's logits by vLLM and by transformers, and what its pieces say of each other."""
    arguments = EngineArgs(
        model=folder, trust_remote_code=True, model_impl="transformers", dtype="float32", enforce_eager=True,
        max_model_len=512,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), torch.no_grad():
        if start:
            init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
            initialize_model_parallel(1, 1)
        try:
            model = get_model(vllm_config=config)
        except ValueError as error:
            return {"refused": str(error)}
        processor: Any = MULTIMODAL_REGISTRY.create_processor(config.model_config)
        whole, own = loaded(folder)

        def made(sizes: list[tuple[int, int]], cache: Any = None) -> Any:
            text = prompt(own, "What is this?", len(sizes))
            items = processor.info.parse_mm_data({"image": [picture(size) for size in sizes]})
            return processor(own.tokenizer.encode(text, add_special_tokens=False), items, cache=cache)

        differences, same_ids, counts = [], [], []
        for sizes in (SIZES[:1], SIZES[:3]):
            inputs = made(sizes)
            ids = torch.tensor(inputs["prompt_token_ids"])
            items, places = inputs["mm_kwargs"]["image"], inputs["mm_placeholders"]["image"]
            tokens = encoded(model, items)
            alone = [encoded(model, [item])[0] for item in items]
            is_image = ids == own.image_token_id
            embeddings = model.embed_input_ids(ids, tokens, is_multimodal=is_image)
            with set_forward_context(None, config):
                logits = model.compute_logits(model(None, torch.arange(len(ids)), None, embeddings))
            text, images = prompt(own, "What is this?", len(sizes)), [picture(size) for size in sizes]
            expected = own(text=text, images=images, add_special_tokens=False, return_tensors="pt")
            same_ids.append(ids.tolist() == expected["input_ids"][0].tolist())
            differences.append((logits - whole(**expected).logits[0]).abs().max().item())
            counts.append([[len(part), place.get_num_embeds()] for part, place in zip(tokens, places, strict=True)])
        cache = MultiModalProcessorOnlyCache(config.model_config)
        for sizes in (SIZES[:1], SIZES[:2], SIZES[:1]):  # the first image is known from the second request on
            inputs = made(sizes, cache)
            tokens = encoded(model, inputs["mm_kwargs"]["image"])
            places = inputs["mm_placeholders"]["image"]
            counts.append([[len(part), place.get_num_embeds()] for part, place in zip(tokens, places, strict=True)])
        dummy = processor.get_dummy_mm_inputs({"image": 2})["mm_placeholders"]["image"]
    return {
        "class": type(model).__name__, "dummy": len(dummy),
        "content_format": _detect_content_format(own.chat_template, default="string"),
        "attention_layers": sorted(model.attention_fusers), "layers": whole.config.text_config.num_hidden_layers,
        "same_ids": same_ids, "differences": differences, "counts": counts,
        "difference_alone": distance(alone, encoded(model, items)),
    }  # fmt: skip


def main(*folders: str) -> None:
    Attention.forward = attention
    print(json.dumps([examined(folder, start=folder == folders[0]) for folder in folders]))


if __name__ == "__main__":
    main(*sys.argv[1:])
