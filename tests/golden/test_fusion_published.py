"""Published fusion, by its tensors: LLaVA-HR, Mini-Gemini, Oryx, Eagle, InternVL, and deformable attention.

Cases are from the public implementations that tests/golden/fusion/manifest.json names. Everything goes through the
public path: a config, and weights by the names that the published modules have.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from moe_vision.experts import EXPERTS
from moe_vision.experts.resolution import resize_positions
from moe_vision.experts.weights import load_state
from moe_vision.fusion import ADAPTERS, MIXERS
from moe_vision.modeling.tower import mix
from moe_vision.slicing import Marker, Plan, Segment, View
from moe_vision.slicing.pack import pack
from moe_vision.types import FeatureMap, MapShape, TokenShape, VisualTokens

HERE = Path(__file__).parent / "fusion"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def golden(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    values = load_file(HERE / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def raster(tokens: torch.Tensor, grid: tuple[int, int]) -> FeatureMap:
    """[V, h * w, C] → FeatureMap [V, C, h, w]."""
    return FeatureMap(tokens.transpose(1, 2).unflatten(2, grid))


def square(tokens: torch.Tensor) -> FeatureMap:
    side = round(tokens.shape[1] ** 0.5)
    return raster(tokens, (side, side))


@torch.no_grad()
@pytest.mark.parametrize("case", ["equal", "slow_larger", "slow_smaller"])
def test_llava_hr_adapter_and_align(case: str) -> None:
    values = golden("llava_hr_adapter")
    maps = {"fast": square(values["fast"]), "slow": FeatureMap(values[f"slow.{case}"])}
    config = MIXERS["mr_adapter"](num_adapters=1, zero_init=False)
    mixer = config.build({name: value.shape for name, value in maps.items()})
    mixer.adapters[0].load_state_dict(golden("llava_hr_adapter", "adapter.w."))
    injected = mixer.injection({"slow": maps["slow"]})(1, 2, maps["fast"].data)
    torch.testing.assert_close(injected.flatten(2).transpose(1, 2), values[f"adapter.out.{case}"], **TOLERANCE)
    align = golden("llava_hr_adapter", "align.w.")
    mixer.load_state_dict({**mixer.state_dict(), **align})
    torch.testing.assert_close(mixer(maps).data, values[f"align.out.{case}"], **TOLERANCE)


def test_llava_hr_refuses_grids_that_do_not_nest() -> None:
    config = MIXERS["mr_adapter"]()
    with pytest.raises(ValueError, match=r"a grid of \[6, 6\] and the base's of \[8, 8\] do not nest, either way"):
        config.build({"fast": MapShape(16, (8, 8)), "slow": MapShape(24, (6, 6))})


class Fast(nn.Module):
    """The stand-in for CLIP: patches, a norm, eight blocks of one tanh layer each."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = {key.split("vision_model.")[1]: value for key, value in weights.items() if "fast_vision" in key}

    def forward(self, views: torch.Tensor, inject: Any = None) -> FeatureMap:
        w = self.weights
        pixels = F.interpolate(views, (336, 336), mode="bilinear", align_corners=True)
        patches = F.conv2d(pixels, w["embeddings.c.weight"], w["embeddings.c.bias"], stride=14)
        x = patches.flatten(2).transpose(1, 2)
        x = F.layer_norm(x, x.shape[-1:], w["pre_layrnorm.weight"], w["pre_layrnorm.bias"])
        for i in range(8):
            x = x + torch.tanh(F.linear(x, w[f"encoder.layers.{i}.l.weight"], w[f"encoder.layers.{i}.l.bias"]))
            x = inject(i + 1, 8, square(x).data).flatten(2).transpose(1, 2)
        return square(x)


class Slow(nn.Module):
    """The stand-in for ConvNeXt: a stem and four convolutions, to a grid of one cell for 32 pixels."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        prefix = "slow_vision_tower.vision_tower."
        self.weights = {key.split(prefix)[1]: value for key, value in weights.items() if prefix in key}

    def forward(self, views: torch.Tensor) -> FeatureMap:
        w = self.weights
        x = F.conv2d(views, w["stem.weight"], w["stem.bias"], stride=4)
        for i in range(4):
            weight = w[f"stages.{i}.weight"]
            x = F.conv2d(x, weight, w[f"stages.{i}.bias"], stride=weight.shape[-1])
        return FeatureMap(x)


@torch.no_grad()
def test_llava_hr_tower_speaks_up_between_blocks() -> None:
    weights = golden("llava_hr_adapter", "tower.w.")
    views = F.interpolate(golden("llava_hr_adapter")["tower.in_seed24"], (768, 768), mode="bilinear")
    config = MIXERS["mr_adapter"](base="fast", zero_init=False)
    mixer = config.build({"slow": MapShape(24, (24, 24)), "fast": MapShape(16, (24, 24))})
    stages, align = "align_stages_latent.", "align_stages.0."
    mixer.load_state_dict(
        {f"adapters.{key.removeprefix(stages)}": v for key, v in weights.items() if key.startswith(stages)}
        | {key.removeprefix(align): value for key, value in weights.items() if key.startswith(align)}
    )
    found = mix({"slow": Slow(weights), "fast": Fast(weights)}, mixer, views)
    torch.testing.assert_close(found.data, golden("llava_hr_adapter")["tower.out"], **TOLERANCE)


def miner(values: dict[str, torch.Tensor], grid: tuple[int, int], fine: tuple[int, int]) -> Any:
    config = MIXERS["patch_mining"](base="clip", zero_init=False)
    mixer = config.build({"clip": MapShape(16, grid), "convnext": MapShape(20, fine)})
    ours = {"query": "query", "keys.convnext": "aux", "values.convnext": "val"}
    mixer.load_state_dict(
        {
            f"{name}.{part}": values[f"w.vlm_uni_{theirs}_projector.{part}"]
            for name, theirs in ours.items()
            for part in ("0.weight", "0.bias", "1.weight", "1.bias")
        }
    )
    return mixer


def projector(values: dict[str, torch.Tensor], tokens: int) -> Any:
    adapter = ADAPTERS["mlp"]().build(TokenShape(tokens, 16, (6, 6)), 12)
    adapter.load_state_dict({f"layers.{k}": v for k, v in golden("mgm_patch_info_mining", "w.mm_projector.").items()})
    return adapter


@torch.no_grad()
def test_mini_gemini_mines_windows() -> None:
    values = golden("mgm_patch_info_mining")
    mixer = miner(values, (6, 6), (24, 24))
    mixed = mixer({"clip": square(values["mine.q"]), "convnext": FeatureMap(values["mine.aux"])})
    torch.testing.assert_close(mixed.data - values["mine.q"], values["mine.out"], **TOLERANCE)
    torch.testing.assert_close(projector(values, 36)(mixed).data, values["encode.grid1.out"], **TOLERANCE)
    with pytest.raises(ValueError, match=r"expert 'convnext': a grid of \[25, 25\] does not nest in one of \[6, 6\]"):
        miner(values, (6, 6), (25, 25))


@torch.no_grad()
def test_mini_gemini_of_four_tiles_and_the_whole() -> None:
    values = golden("mgm_patch_info_mining")
    images, aux = values["encode.grid2_global.images"], values["encode.grid2_global.aux"]
    mixer, project = miner(values, (6, 6), (24, 24)), projector(values, 36)
    quarters = [aux[:, :, y : y + 24, x : x + 24] for y in (0, 24) for x in (0, 24)]
    whole = F.interpolate(aux, scale_factor=0.5, mode="bilinear")
    parts = [(images[:, 4], whole), *((images[:, i], quarter) for i, quarter in enumerate(quarters))]
    found = [project(mixer({"clip": square(q), "convnext": FeatureMap(a)})).data for q, a in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), values["encode.grid2_global.out"], **TOLERANCE)


@torch.no_grad()
def test_deformable_attention_over_two_levels() -> None:
    values = golden("deformable_cross_attn")
    levels = {
        "fine": values["kv"][:, :144].unflatten(1, (12, 12)),
        "coarse": values["kv"][:, 144:].unflatten(1, (6, 8)),
    }
    maps = {"base": square(values["q"])} | {n: FeatureMap(v.permute(0, 3, 1, 2)) for n, v in levels.items()}
    config = MIXERS["deformable"](num_heads=4, num_points=4)
    mixer = config.build({name: value.shape for name, value in maps.items()})
    weights = golden("deformable_cross_attn", "w.")
    value_proj = {f"value_proj.{n}.{k}": weights[f"value_proj.{k}"] for n in levels for k in ("weight", "bias")}
    mixer.load_state_dict({k: v for k, v in weights.items() if not k.startswith("value_proj")} | value_proj)
    torch.testing.assert_close(mixer(maps).data - values["q"], values["out"], **TOLERANCE)


@torch.no_grad()
def test_eagle_concatenates_on_a_grid_of_six() -> None:
    values = golden("eagle_channel_concat")
    maps = {"a": square(values["feat0"]), "b": square(values["feat1"]), "c": FeatureMap(values["feat2"])}
    config = MIXERS["channel_concat"](grid=(6, 6), align_corners=True)
    mixer = config.build({name: value.shape for name, value in maps.items()})
    torch.testing.assert_close(mixer(maps).data, values["out"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "side", "grid"), [("image", 1, (5, 7)), ("video", 2, (6, 8)), ("video_long", 4, (8, 12))]
)
def test_oryx_compresses_by_modality(mode: str, side: int, grid: tuple[int, int]) -> None:
    values = golden("oryx_compressor")
    x = values[f"compressor.{mode}.in"]
    adapter = ADAPTERS["region_attention"](side=side).build(TokenShape(x.shape[1], 24, grid), 20)
    for ours, theirs in (("query", "vlm_query_projector"), ("key", "vlm_key_projector")):
        adapter.get_submodule(ours).load_state_dict(golden("oryx_compressor", f"compressor.w.{theirs}."))
    found = adapter.compress(VisualTokens(x, grid)).data
    torch.testing.assert_close(found, values[f"compressor.{mode}.out"], **TOLERANCE)
    with pytest.raises(ValueError, match=r"side 2 of region_attention does not divide the grid \[5, 7\]"):
        ADAPTERS["region_attention"](side=2).build(TokenShape(35, 24, (5, 7)), 20)


@torch.no_grad()
def test_oryx_tells_begin_rows_and_end() -> None:
    values = golden("oryx_compressor")
    adapter = ADAPTERS["mlp"]().build(TokenShape(12, 24, (3, 4)), 20)
    adapter.load_state_dict({f"layers.{k}": v for k, v in golden("oryx_compressor", "projector.w.proj.").items()})
    markers = {f"image_{name}": values[f"projector.w.image_{theirs}"] for name, theirs in
               (("begin", "begin"), ("end", "end"), ("newline", "newline"), ("separator", "sep"))}  # fmt: skip
    begin, end, newline, separator = (Marker(name) for name in markers)
    views = [View("overview", ()), View("slice", ())]
    low, high = (
        Segment((view,), (1, 1), grid, row_end=newline) for view, grid in zip(views, ((3, 4), (5, 7)), strict=True)
    )
    plan = Plan("oryx", (80, 112), (begin, low, separator, high, end))
    features = [adapter(VisualTokens(values[f"projector.image.{name}"])).data[0] for name in ("lo", "hi")]
    torch.testing.assert_close(pack(plan, features, markers)[None], values["projector.image.out"], **TOLERANCE)
    frames = adapter(VisualTokens(values["projector.video.hi"])).data
    pieces = [piece for _ in frames for piece in (Segment((views[0],), (1, 1), (3, 4), row_end=newline), separator)]
    plan = Plan("oryx", (48, 64), (begin, *pieces, end))
    torch.testing.assert_close(pack(plan, list(frames), markers)[None], values["projector.video.out"], **TOLERANCE)


@torch.no_grad()
def test_oryx_vit_at_native_sizes() -> None:
    architecture = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 128, "patch_size": 16, "hidden_act": "gelu",
    }  # fmt: skip
    config = EXPERTS["siglip"](
        variant="v2_base_patch16_512", pretrained=None, architecture=architecture, sizing="native", final_norm=False,
        position_filter="bilinear", antialias_positions=False, mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    expert = config.build().eval()
    weights = golden("oryx_compressor", "vit.w.")
    load_state(expert, weights, "golden")
    for i, grid in enumerate([(2, 3), (4, 2), (4, 4)]):
        pixels = golden("oryx_compressor")[f"vit.pack.in{i}"].float()  # kept in 16 bits
        missing = (-pixels.shape[3] % 16, -pixels.shape[2] % 16)
        padded = F.pad(pixels, (0, missing[0], 0, missing[1]))  # as its list mode does
        found = expert.encode(padded)
        assert found.shape[2:] == grid
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), golden("oryx_compressor")[f"vit.pack.out{i}"],
                                   **TOLERANCE)  # fmt: skip
    table = weights["pos_embed"].unflatten(1, (8, 8))
    for grid in ((12, 3), (5, 7)):
        found = resize_positions(table, grid, False, "bilinear").flatten(1, 2)
        torch.testing.assert_close(found, golden("oryx_compressor")[f"vit.rescale_pos.{grid[0]}x{grid[1]}"])


@torch.no_grad()
def test_radio_crops_its_positions_out_of_a_square() -> None:
    architecture = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "max_img_size": 256,
    }  # fmt: skip
    expert: Any = (
        EXPERTS["radio"](variant="v4_h", pretrained=None, architecture=architecture, image_size=(256, 256))
        .build()
        .eval()
    )
    embeddings = expert.model.embeddings
    values = golden("radio_cpe_pos")
    (table,) = (p for p in embeddings.parameters() if p.shape == values["pos_embed"].shape)
    table.copy_(values["pos_embed"])
    for height, width in ((8, 8), (5, 9), (16, 16), (20, 12)):
        shape = (height * 16, width * 16)
        black, prefix = torch.zeros(1, 3, *shape), embeddings(torch.zeros(1, 3, 16, 16)).shape[1] - 1
        with_positions = embeddings(black)[:, prefix:]
        table.zero_()
        without = embeddings(black)[:, prefix:]
        table.copy_(values["pos_embed"])
        torch.testing.assert_close(with_positions - without, values[f"pos.{height}x{width}"], **TOLERANCE)


@torch.no_grad()
def test_internvl_shuffles_pixels() -> None:
    values = golden("internvl_pixel_shuffle")
    adapter = ADAPTERS["mlp"](depth=1, merge=2).build(TokenShape(64, 6, (8, 8)), 24)
    adapter.layers[0].load_state_dict({"weight": torch.eye(24), "bias": torch.zeros(24)})
    shuffled = adapter(VisualTokens(values["in"].flatten(1, 2), (8, 8))).data.unflatten(1, (4, 4))
    assert torch.equal(shuffled, values["out_v2"]) and torch.equal(shuffled, values["out_hf"])
    assert torch.equal(shuffled.transpose(1, 2), values["out_v1"])
