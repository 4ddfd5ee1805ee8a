"""Every mixer, adapter, selector and slicing policy goes along with a saved folder. (Experts: test_zoo.py.)"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_vision.modeling.compose import save
from moe_vision.registry import ADAPTERS, MIXERS, SELECTORS, SLICING
from tests.export.isolated import isolated
from tests.export.scripts.folder import prompt
from tests.sliced import COMPOSITIONS, FIXED, pictures
from tests.tiny import tiny_model

MLP = {"type": "mlp", "pool": 2}
GRID = {"type": "channel_concat", "grid": [4, 4]}


def one_view(mixer: dict[str, Any] = GRID, adapter: dict[str, Any] = MLP) -> dict[str, Any]:
    return {"experts": {"clip": FIXED, "sam": FIXED}, "branches": {"overview": {"mixer": mixer, "adapter": adapter}}}


def with_selector(selector: dict[str, Any]) -> dict[str, Any]:
    base = COMPOSITIONS["slime, its own adapters and a selector"]
    return {**base, "branches": {**base["branches"], "selector": selector}}


CASES: dict[str, dict[str, Any]] = {
    **COMPOSITIONS,
    "mixer sequence_append": one_view(
        {"type": "sequence_append", "hidden_size": 16, "grids": {"sam": [4, 4]}}, {"type": "mlp"}
    ),
    "mixer deformable": one_view(
        {"type": "deformable", "num_heads": 2, "num_points": 2, "num_levels": 2, "zero_init": False}
    ),
    "mixer mr_adapter": one_view({"type": "mr_adapter", "num_adapters": 2, "zero_init": False}),
    "mixer patch_mining": one_view({"type": "patch_mining", "base": "clip", "zero_init": False}),
    "adapter region_attention": one_view(adapter={"type": "region_attention", "side": 2, "attention_size": 8}),
    "selector published": with_selector({"type": "published", "top_p": 0.6}),
    "selector random": with_selector({"type": "random", "top_k": 5}),
}


def types_of(values: Any) -> set[str]:
    """Every `type` anywhere in plain values."""
    if isinstance(values, dict):
        own = {values["type"]} if isinstance(values.get("type"), str) else set()
        return own.union(*map(types_of, values.values()))
    return set()


def test_every_mixer_adapter_selector_and_policy_survives(tmp_path: Path) -> None:
    assert {*MIXERS, *ADAPTERS, *SELECTORS, *SLICING} - {"none"} <= types_of(CASES)
    for name, changes in CASES.items():
        model, processor = tiny_model(**changes)
        save(model, processor, tmp_path / "folders" / name / "model")
        texts = [prompt(processor, "What is red?"), prompt(processor, "Where is it?", 2)]
        inputs = processor(images=pictures(), text=texts, padding=True, return_tensors="pt")
        torch.manual_seed(0)
        with torch.inference_mode():
            logits = model(**inputs).logits
        file = tmp_path / "folders" / name / "expected.safetensors"
        save_file({key: value.contiguous() for key, value in {**inputs, "logits": logits}.items()}, file)
    differences = isolated("survivors", tmp_path / "folders", home=tmp_path / "home")
    assert differences == dict.fromkeys(CASES, 0)
