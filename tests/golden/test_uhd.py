"""LLaVA-UHD's published tensors: its CLIP at any shape, its two resamplers, and the order in which it tells a slice.

Cases are from thunlp/LLaVA-UHD at dd7f6cc (manifest.json says how), the 64 queries from guozonghao96/llava at 28d6a5f.
Everything goes through the public path: a config, and weights renamed by the code that imports a checkpoint.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_vision.experts import EXPERTS
from moe_vision.experts.weights import load_state
from moe_vision.fusion import ADAPTERS, Adapter
from moe_vision.fusion.perceiver import sincos_positions
from moe_vision.interop.checkpoint import resampler_weights
from moe_vision.modeling import MoeVisionConfig, MoeVisionForConditionalGeneration, MoeVisionVisionConfig
from moe_vision.modeling.image_processing_moe_vision import join_views
from moe_vision.types import TokenShape, VisualTokens

HERE = Path(__file__).parent / "uhd"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "uhd"
MANIFEST = json.loads((HERE / "manifest.json").read_text())
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CLIP = MANIFEST["adapt_clip"]["config"]
EXPERT: dict[str, Any] = {
    "variant": "vit_large_patch14_336", "pretrained": None, "layer": -2, "sizing": "native", "image_size": [112, 112],
    "antialias_positions": False,
    "architecture": {
        "hidden_size": CLIP["hidden"], "intermediate_size": CLIP["inter"], "num_hidden_layers": CLIP["layers"],
        "num_attention_heads": CLIP["heads"], "image_size": CLIP["image_size"], "patch_size": CLIP["patch"],
        "hidden_act": CLIP["act"],
    },
}  # fmt: skip


def golden(name: str) -> dict[str, torch.Tensor]:
    for folder in (HERE, SHARED):
        if (folder / f"{name}.safetensors").is_file():
            return load_file(folder / f"{name}.safetensors")
    pytest.skip(f"{name}.safetensors is not here")


def resampler(kind: str, weights: dict[str, torch.Tensor], **settings: Any) -> Adapter:
    """The adapter with published weights, without a test's key being left over or missing."""
    queries, width = weights["query"].shape
    channels = weights["kv_proj.weight"].shape[1]
    config = ADAPTERS[kind](num_queries=queries, **settings)
    adapter = config.build(TokenShape(64, channels, (8, 8)), width)
    adapter.load_state_dict(resampler_weights(weights, "golden"))
    return adapter.eval()


def grids(values: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for key in values if key.startswith("x_") for h, w in [key[2:].split("x")]]


@torch.no_grad()
def test_cells_of_144_queries() -> None:
    case = MANIFEST["spatial_resampler_g8"]["config"]
    adapter = resampler("cell", golden("spatial_resampler_g8_weights"), num_heads=case["num_heads"], align="reference")
    values = golden("spatial_resampler_g8_io")
    assert len(grids(values)) == 13
    for height, width in grids(values):
        tokens = VisualTokens(values[f"x_{height}x{width}"], (height, width))
        expected = values[f"y_{height}x{width}"]
        torch.testing.assert_close(adapter(tokens).data, expected, **TOLERANCE)


@torch.no_grad()
def test_centred_cells_differ_by_the_published_shift() -> None:
    weights, values = golden("spatial_resampler_g8_weights"), golden("spatial_resampler_g8_io")
    tokens = VisualTokens(values["x_24x24"], (24, 24))
    found = {a: resampler("cell", weights, num_heads=4, align=a)(tokens).data for a in ("centered", "reference")}
    assert (found["centered"] - found["reference"]).abs().mean() > 0.05


@torch.no_grad()
def test_64_queries_over_the_whole_view() -> None:
    values = golden("perceiver64_fp32")
    weights = {key.removeprefix("w."): value for key, value in values.items() if key.startswith("w.")}
    adapter = resampler("perceiver", weights, num_heads=MANIFEST["perceiver64_fp32"]["config"]["heads"])
    assert len(grids(values)) == 5
    for height, width in grids(values):
        tokens = VisualTokens(values[f"x_{height}x{width}"], (height, width))
        torch.testing.assert_close(adapter(tokens).data, values[f"y_{height}x{width}"], **TOLERANCE)


def test_fixed_positions() -> None:
    weights = golden("spatial_resampler_g8_weights")
    torch.testing.assert_close(sincos_positions(8, 32, torch.device("cpu")), weights["pos_embed"], atol=1e-6, rtol=0)
    for name, expected in golden("pos_embed").items():  # sincos_g8_d32, interp_g8_d32_to_19x29
        side, channels = (int(part[1:]) for part in name.split("_")[1:3])
        found = sincos_positions(side, channels, torch.device("cpu"))
        if "_to_" in name:
            height, width = (int(number) for number in name.split("_to_")[1].split("x"))
            config = ADAPTERS["perceiver"](num_queries=side**2, num_heads=1)
            adapter: Any = config.build(TokenShape(4, 8, (2, 2)), channels)
            found = adapter.positions((height, width))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_clip_at_any_shape() -> None:
    expert = EXPERTS["clip"](**EXPERT, mean=[0, 0, 0], std=[1, 1, 1]).build()
    load_state(expert, golden("adapt_clip_weights"), "golden")
    expert.eval()
    values = golden("adapt_clip_io")
    names = [name for name in values if name.startswith("img_")]
    assert len(names) == 8
    for name in names:
        found = expert(values[name][None]).data.flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, values[name.replace("img", "feat")], **TOLERANCE)


@cache
def schema() -> tuple[MoeVisionForConditionalGeneration, dict[str, torch.Tensor]]:
    """The published whole in miniature: slicing at 112 pixels, CLIP, 16 queries, a prompt; and its tensors."""
    values = golden("spatial_schema")
    experts = [{"name": "clip", "type": "clip", **EXPERT, "mean": [0, 0, 0], "std": [1, 1, 1]}]
    branch = {
        "mixer": {"type": "channel_concat", "grid": None},
        "adapter": {"type": "cell", "num_queries": 16, "num_heads": 2, "align": "reference"},
    }
    slicing = {"type": "uhd", "max_slices": 7, "scale_resolution": 112}
    marker_ids = {"slice_end": 29892, "row_end": 13}
    vision = MoeVisionVisionConfig(experts, {"overview": branch}, slicing, marker_ids)
    text = {
        "model_type": "llama", "vocab_size": 29893, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    model = MoeVisionForConditionalGeneration(MoeVisionConfig(vision, text, image_token_id=0)).eval()
    load_state(model.model.vision_tower.experts["clip"], golden("adapt_clip_weights"), "golden")
    projector = {key.removeprefix("proj."): value for key, value in values.items() if key.startswith("proj.")}
    model.model.multi_modal_projector["overview"].load_state_dict(resampler_weights(projector, "golden"))
    with torch.no_grad():
        model.get_input_embeddings().weight[values["embed_ids"]] = values["embed_rows"]
    return model, values


@torch.no_grad()
@pytest.mark.parametrize("number", range(4))
def test_from_views_to_the_embeddings_of_a_prompt(number: int) -> None:
    case = MANIFEST["spatial_schema"]["cases"][number]
    model, values = schema()
    width, height = case["image_wh"]
    plan = model.model.policy.plan((height, width))
    slices, overview = values[f"c{number}_slices"], values[f"c{number}_source"]
    views = [*(slices if case["grid"] else []), overview]
    assert [view.size for view in plan.views] == [tuple(view.shape[1:]) for view in views]
    sizes = torch.tensor([[height, width, 1]] * len(views))
    tokens = model.get_image_features(join_views(views), sizes, return_dict=True).pooler_output[0]
    expected = values[f"c{number}_inputs_embeds"][0]
    ids = torch.tensor([token for i in case["input_ids"] for token in ([0] * len(tokens) if i == -200 else [i])])[None]
    embeddings = model.model.splice(ids, model.get_input_embeddings()(ids), tokens)[0]
    torch.testing.assert_close(embeddings, expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("positions", [True, False])
def test_queries_with_and_without_positions(positions: bool) -> None:
    """Versions 2 and 3 add none to the queries; torch's own attention is the reference."""
    values = golden("perceiver64_fp32")
    weights = {key.removeprefix("w."): value for key, value in values.items() if key.startswith("w.")}
    adapter = resampler("perceiver", weights, num_heads=4, query_positions=positions)
    attention = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    attention.load_state_dict({k.removeprefix("attn."): v for k, v in weights.items() if k.startswith("attn.")})

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (64,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    height, width = 19, 29
    table = weights["pos_embed"].T.unflatten(1, (8, 8))[None]
    places = torch.nn.functional.interpolate(table, (height, width), mode="bicubic", align_corners=False)
    x = values[f"x_{height}x{width}"]
    inputs = norm(x @ weights["kv_proj.weight"].T, "ln_kv")
    query = norm(weights["query"], "ln_q") + (weights["pos_embed"] if positions else 0)
    keys = inputs + places[0].flatten(1).T
    attended = attention(query[None].expand(len(x), -1, -1), keys, inputs, need_weights=False)[0]
    found = adapter(VisualTokens(x, (height, width))).data
    torch.testing.assert_close(found, norm(attended, "ln_post") @ weights["proj"], **TOLERANCE)
    assert torch.allclose(found, values[f"y_{height}x{width}"], atol=1e-3) == positions
