"""LLaVA-UHD's vision path on images of mixed sizes: plan, render, encode and resample, four ways side by side.

ours: the image processor and the model, views of one size together. published: view by view, as version 1 of the
published code computes (published_uhd.py, on the same weights). padded: all views in one batch, the shorter ones padded
to the longest, as version 2 does. view by view: ours, one view at a time: what the buckets add.

Then the resampler alone, and the FLOPs of the whole model relative to LLaVA-1.5 at 336 pixels.

python benchmarks/slicing.py
python benchmarks/slicing.py --queries 64 --sizes 672x1008,480x640,333x500,1200x300 --device cuda --dtype bfloat16
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import published_uhd
import torch
import typer
from experts import Meter, compare
from PIL import Image
from rich.console import Console
from rich.table import Table

from moe_vision.config import merge, read_yaml, validate
from moe_vision.modeling import MoeVisionImageProcessor, MoeVisionModel
from moe_vision.modeling.cost import cost
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.slicing.pack import pack
from moe_vision.slicing.render import render
from moe_vision.types import VisualTokens
from moe_vision.viz.plans import parse_size

PRESETS = {64: "llava-uhd", 144: "llava-uhd-144"}
LLAVA = {
    "experts": {"clip": {"variant": "vit_large_patch14_336", "layer": -2}},
    "branches": {
        "overview": {"mixer": {"type": "channel_concat", "grid": None}, "adapter": {"type": "mlp"}},
    },
}
"""LLaVA-1.5's vision path; its image is one view of 336 pixels and 576 tokens."""

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def composition(queries: int, width: int, tiny: bool) -> ModelConfig:
    """A preset of LLaVA-UHD with random weights and as good as no language model behind it."""
    values = read_yaml(packaged_config(f"model/{PRESETS[queries]}.yaml"))
    values["experts"]["clip"] |= {"pretrained": None, **({"architecture": TINY} if tiny else {})}
    values["branches"]["overview"]["adapter"] |= {"align": "reference"} if queries == 144 else {}
    values["language_model"] = {
        "architecture": {
            "model_type": "llama", "hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8,
        }
    }  # fmt: skip
    return validate(ModelConfig, values, source=PRESETS[queries])


class Ways:
    """One model and one batch of pictures, and every way from them to the images' tokens, joined."""

    def __init__(self, config: ModelConfig, pictures: list[Image.Image], device: str, dtype: torch.dtype) -> None:
        hf_config = config.hf_config(0, {"slice_end": 1, "row_end": 2})
        self.model = MoeVisionModel(hf_config).to(device, dtype).eval()
        with torch.no_grad():  # some libraries draw weights so small that attention would have no say in the output
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.02)
        self.pictures, self.device, self.dtype = pictures, device, dtype
        self.processor = MoeVisionImageProcessor(slicing=hf_config.vision_config.slicing)
        self.adapter: Any = self.model.multi_modal_projector["overview"]
        self.clip = published_uhd.PublishedClip(self.model.vision_tower.experts["clip"]).to(device, dtype).eval()
        self.attend = published_uhd.attention(self.adapter)
        self.resample = published_uhd.cell if self.adapter.config.type_name == "cell" else published_uhd.perceiver

    def ours(self) -> torch.Tensor:
        inputs = self.processor(self.pictures, return_tensors="pt").to(self.device)
        found: Any = self.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        return torch.cat(found.pooler_output)

    def views(self) -> list[torch.Tensor]:
        """Views [3, h, w] in [0, 1] of all pictures, in their plans' order."""
        self.plans = [self.model.policy.plan((picture.height, picture.width)) for picture in self.pictures]
        images = [self.processor.process_image(picture, do_convert_rgb=True) for picture in self.pictures]
        made = [view for image, plan in zip(images, self.plans, strict=True) for view in render(image, plan.views)]
        return [view.to(self.device, self.dtype) / 255 for view in made]

    def joined(self, encode: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> torch.Tensor:
        """The images' tokens from views that `encode` brings to features [1, n, C], resampled as published."""
        views = self.views()
        resampled = []
        for view, features in zip(views, encode(views), strict=True):
            grid = (view.shape[1] // 14, view.shape[2] // 14)
            resampled.append(self.resample(self.adapter, self.attend, features, grid)[0])
        return self.packed(resampled)

    def packed(self, features: list[torch.Tensor]) -> torch.Tensor:
        rest, markers = iter(features), self.model.marker_embeddings()
        return torch.cat([pack(plan, [next(rest) for _ in plan.views], markers) for plan in self.plans])

    def one_by_one(self) -> torch.Tensor:
        tower, adapter = self.model.vision_tower, self.adapter
        return self.packed([adapter(tower(view[None])).data[0] for view in self.views()])

    def all(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "ours": self.ours,
            "published": lambda: self.joined(self.clip.one_by_one),
            "padded": lambda: self.joined(self.clip.padded),
            "view by view": self.one_by_one,
        }

    def resampler(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The resampler alone, on random features of the batch's views: in buckets, and one by one as published."""
        grids = [(view.shape[1] // 14, view.shape[2] // 14) for view in self.views()]
        channels = self.adapter.input_proj.in_features
        features = [torch.randn(1, h * w, channels, device=self.device, dtype=self.dtype) for h, w in grids]
        order = sorted(range(len(grids)), key=lambda row: grids[row])

        def buckets() -> torch.Tensor:
            found = []
            for grid in sorted(set(grids)):
                together = torch.cat([features[row] for row in order if grids[row] == grid])
                found.append(self.adapter(VisualTokens(together, grid)).data)
            return torch.cat(found)

        def published() -> torch.Tensor:
            return torch.cat([self.resample(self.adapter, self.attend, features[row], grids[row]) for row in order])

        return {"ours": buckets, "published": published}


@dataclass
class Compute:
    """GFLOP of one image's forward pass, visual tokens only, and what they are relative to LLaVA-1.5's."""

    model: str
    image: str
    tokens: int
    vision: float
    adapter: float
    language_model: float
    relative: float


def compute(sizes: list[tuple[int, int]]) -> list[Compute]:
    """Both presets and LLaVA-1.5, with Vicuna 7B and 13B."""
    rows = []
    for vicuna in ("7b", "13b"):
        language = read_yaml(packaged_config(f"language_model/vicuna-{vicuna}.yaml"))
        reference = 0.0
        for name, image_sizes in (("llava-1.5", [(336, 336)]), *((preset, sizes) for preset in PRESETS.values())):
            values = LLAVA if name == "llava-1.5" else read_yaml(packaged_config(f"model/{name}.yaml"))
            config = validate(ModelConfig, merge(values, language), source=name)
            for size in image_sizes:
                table = cost(config, size, text_tokens=0)
                flops = {part.part.split(".")[0]: part.flops / 1e9 for part in table.parts}
                reference = reference or table.flops
                rows.append(
                    Compute(
                        f"{name} {vicuna}", f"{size[0]}x{size[1]}", table.visual_tokens, flops["experts"],
                        flops["adapters"], flops["language_model"], table.flops / reference,
                    )
                )  # fmt: skip
    return rows


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy())


def main(
    sizes: Annotated[str, typer.Option(help="Of one batch of images, HEIGHTxWIDTH with commas.")] = (
        "672x1008,1344x1008,672x1008,1344x1008"
    ),
    queries: Annotated[int, typer.Option(help="144 (cell) or 64 (perceiver).")] = 144,
    width: Annotated[int, typer.Option(help="Of the language model: 4096 with 7B, 5120 with 13B.")] = 4096,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: str = "float32",
    rounds: Annotated[int, typer.Option(help="How often each way runs; the fastest counts.")] = 1,
    tiny: Annotated[bool, typer.Option(help="Miniature layers, to see that everything runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time LLaVA-UHD's vision path side by side."""
    torch.manual_seed(0)
    meter, kind = Meter(torch.device(device), tiny), getattr(torch, dtype)
    batch = [parse_size(text) for text in sizes.split(",")]
    config = composition(queries, width if not tiny else 64, tiny)
    tables = [cost(config, size, text_tokens=0) for size in batch]
    vision = sum(part.flops for table in tables for part in table.parts if part.part != "language_model")
    resampler = sum(part.flops for table in tables for part in table.parts if part.part.startswith("adapters"))
    ways = Ways(config, [noise(size, seed) for seed, size in enumerate(batch)], device, kind)
    peak = meter.peak(kind)
    whole, alone = ways.all(), ways.resampler()
    with torch.no_grad():
        for way in ("padded", "view by view") if tiny else ():
            torch.testing.assert_close(whole[way](), whole["published"](), atol=1e-3, rtol=1e-3)
    adapter = config.branches.overview.adapter.type_name
    rows = compare("vision path", whole, vision // len(batch), len(batch), False, meter, peak, rounds, [ways.model])
    rows += compare(adapter, alone, resampler // len(batch), len(batch), False, meter, peak, rounds, [ways.model])
    counted = compute(sorted(set(batch)))
    if as_json:
        print(json.dumps({"rows": [asdict(r) for r in rows], "flops": [asdict(r) for r in counted]}, indent=1))
        return
    unit = "CPU-s" if device == "cpu" else "s"
    table = Table(title=f"{len(batch)} images ({sizes}), {dtype}, {device}")
    for column in ("what", "way", unit, f"images/{unit}", "of peak", "GB beyond weights", "x published", "difference"):
        table.add_column(column, justify="left" if column in ("what", "way") else "right")
    for row in rows:
        table.add_row(
            row.model, row.way, f"{row.seconds:.2f}", f"{row.images_per_second:.3f}", f"{row.of_peak:.0%}",
            f"{row.memory_gb:.2f}", "" if row.speed_up is None else f"{row.speed_up:.2f}",
            "" if row.difference is None else f"{row.difference:.0e}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    flops = Table(title="GFLOP of one image, visual tokens only in the language model")
    for column in ("model", "image", "tokens", "experts", "adapter", "language model", "x LLaVA-1.5"):
        flops.add_column(column, justify="left" if column == "model" else "right")
    for entry in counted:
        flops.add_row(
            entry.model, entry.image, str(entry.tokens), f"{entry.vision:.0f}", f"{entry.adapter:.0f}",
            f"{entry.language_model:.0f}", f"{entry.relative:.2f}",
        )  # fmt: skip
    console.print(flops)


if __name__ == "__main__":
    typer.run(main)
