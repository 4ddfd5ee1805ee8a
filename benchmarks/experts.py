"""Every expert and the Eagle-X4 and X5 towers, forward or forward and backward, three ways side by side in one run.

ours: `Expert.forward`. published: the plain translation in published.py, on the same weights. library: the stock
implementation that other projects use (transformers, timm), with random weights of its own.

Time is CPU-seconds of the process on a CPU, wall seconds on a GPU. The peak is the best rate of fp32 (or --dtype)
matrix products measured before and after. Memory is what a call holds at its worst beyond weights and input.

python benchmarks/experts.py --towers x5
python benchmarks/experts.py --experts sam,eva02 --backward --device cuda --dtype bfloat16 --batch 16
"""

import ctypes
import gc
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import published
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.experts import EXPERTS, Expert
from moe_vision.modeling.cost import flops_of
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.types import FeatureMap

TINY: dict[str, dict[str, Any]] = {
    "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "convnext": {"hidden_sizes": [8, 16, 24, 48], "depths": [1, 1, 2, 1]},
    "sam": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64,
            "global_attn_indexes": [1]},
    "eva02": {"hidden_size": 32, "depth": 2, "num_heads": 2, "global_blocks": [1]},
    "pix2struct": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "d_kv": 16, "d_ff": 64},
}  # fmt: skip


@dataclass
class Row:
    """One way of one model: seconds for `batch` images, FLOP per second over the peak, gigabytes beyond weights."""

    model: str
    way: str
    seconds: float
    images_per_second: float
    of_peak: float
    memory_gb: float
    speed_up: float | None
    difference: float | None


class Meter:
    """Time and memory of calls on one device. tiny: the peak is found with small matrices, in a moment."""

    def __init__(self, device: torch.device, tiny: bool = False) -> None:
        self.device, self.tiny = device, tiny

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def measure(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        """What a call returns, its seconds, and the gigabytes that it held at its worst."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            started = self.now()
            result = call()
            return result, self.now() - started, (torch.cuda.max_memory_allocated() - before) / 1e9
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        before, peak, done = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.005):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = self.now()
        result = call()
        seconds = self.now() - started
        done.set()
        watcher.join()
        return result, seconds, max(0, peak - before) / 1e9

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP per second of the best of some large matrix products."""
        best = 0.0
        sizes = [(4096, 1024, 4096), (4096, 4096, 1024), (2048, 2048, 2048)]
        for rows, inner, columns in sizes:
            if self.tiny:
                rows, inner, columns = rows // 8, inner // 8, columns // 8
            a = torch.randn(rows, inner, device=self.device, dtype=dtype)
            b = torch.randn(columns, inner, device=self.device, dtype=dtype)
            repeats = 200 if self.device.type == "cuda" else 8
            nn.functional.linear(a, b)
            started = self.now()
            for _ in range(repeats):
                nn.functional.linear(a, b)
            best = max(best, 2 * rows * inner * columns * repeats / (self.now() - started))
        return best


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def stock(expert: Expert) -> nn.Module | None:
    """The library's own model of the same architecture, or None if no library has it."""
    settings, kind = expert.config.settings, expert.config.type_name
    if kind == "convnext":
        import timm

        model: Any = timm.create_model(
            "convnext_xxlarge", depths=settings["depths"], dims=settings["hidden_sizes"], num_classes=0
        )
        return nn.Sequential(model.stem, model.stages)
    if kind == "sam":
        from transformers import SamVisionConfig, SamVisionModel

        return SamVisionModel(SamVisionConfig(**settings))
    if kind == "clip":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return Interpolating(CLIPVisionModel(CLIPVisionConfig(**settings)))
    if kind == "pix2struct":
        from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

        return Patches(Pix2StructVisionModel(Pix2StructVisionConfig(**settings)), expert.config.shape.grid)
    return None


class Interpolating(nn.Module):
    """transformers' CLIP, told to take another size than its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.model(pixels, interpolate_pos_encoding=True)


class Patches(nn.Module):
    """transformers' Pix2Struct on patches as its processor gives them: 2048, the last ones padding."""

    def __init__(self, model: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, pixels: torch.Tensor) -> Any:
        tokens = self.grid[0] * self.grid[1]
        patches = torch.randn(len(pixels), 2048, 770, device=pixels.device, dtype=pixels.dtype)
        patches[..., :2] = 1
        mask = (torch.arange(2048, device=pixels.device) < tokens).expand(len(pixels), -1)
        return self.model(flattened_patches=patches, attention_mask=mask.to(pixels.dtype))


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor to compare and to differentiate."""
    if isinstance(output, FeatureMap):
        return output.data
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def compare(
    name: str, ways: dict[str, Callable[[], Any]], flops: int, batch: int, backward: bool, meter: Meter, peak: float,
    rounds: int, modules: list[nn.Module],
) -> list[Row]:  # fmt: skip
    """Run every way in turn, `rounds` times, and keep each one's fastest; outputs of ours and published must agree."""
    results: dict[str, tuple[float, float]] = {}
    outputs: dict[str, torch.Tensor] = {}

    def run(call: Callable[[], Any]) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            output = tensor_of(call())
            if backward:
                output.float().square().mean().backward()
            return output.detach()

    for _ in range(rounds):
        for way, call in ways.items():
            for module in modules:
                module.zero_grad(set_to_none=True)
            outputs[way], seconds, memory = meter.measure(lambda call=call: run(call))  # type: ignore[misc]
            fastest, least = results.get(way, (seconds, memory))
            results[way] = (min(fastest, seconds), min(least, memory))
    difference = None
    if "published" in outputs:
        gap = (outputs["ours"].float() - outputs["published"].float()).abs().max()
        difference = float(gap / outputs["published"].float().abs().max())
        if difference > (1e-3 if outputs["ours"].dtype == torch.float32 else 0.1):
            raise RuntimeError(f"{name}: ours and the published computation differ by {difference:.1e} of the largest")
    total = flops * batch * (3 if backward else 1)
    reference = results.get("published", (None,))[0]
    return [
        Row(
            name, way, seconds, batch / seconds, total / seconds / peak, memory,
            None if reference is None else reference / seconds, difference if way == "ours" else None,
        )
        for way, (seconds, memory) in results.items()
    ]  # fmt: skip


def composition(tower: str, tiny: bool) -> ModelConfig:
    """Eagle-X4 or X5 of the presets; `tiny` keeps grids and sizes and makes every layer small."""
    values = read_yaml(packaged_config(f"model/eagle-{tower}.yaml"))
    for name in list(values["experts"]):
        values = apply_override(values, f"experts.{name}.pretrained=null")
        if tiny:
            values["experts"][name] = {**values["experts"][name], "architecture": TINY[name]}
    return validate(ModelConfig, values, source=tower)


def main(
    experts: Annotated[str, typer.Option(help="Families to time one by one, with commas; `none` for none.")] = "none",
    towers: Annotated[str, typer.Option(help="x4, x5, both with a comma, or `none`.")] = "none",
    backward: Annotated[bool, typer.Option(help="Forward and backward.")] = False,
    batch: int = 1,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: str = "float32",
    rounds: Annotated[int, typer.Option(help="How often each way runs; the fastest counts.")] = 1,
    library: Annotated[bool, typer.Option(help="The libraries' stock implementations as well.")] = True,
    tiny: Annotated[bool, typer.Option(help="Miniature layers, to see that everything runs.")] = False,
    compile_experts: Annotated[bool, typer.Option("--compile", help="Ours through torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option(help="ConvNeXt in channels-last memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time experts and towers side by side."""
    torch.manual_seed(0)
    place, kind = torch.device(device), getattr(torch, dtype)
    meter = Meter(place, tiny)
    peak = meter.peak(kind)
    rows: list[Row] = []
    x5 = composition("x5", tiny)

    def prepared(module: Any) -> Any:
        module = module.to(place, kind).train(backward)
        with torch.no_grad():  # some libraries draw weights so small that attention would have no say in the output
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.02)
        return module.to(memory_format=torch.channels_last) if channels_last else module

    for name in [] if experts == "none" else experts.split(","):
        config = x5.experts.get(name) or EXPERTS[name](variant=next(iter(EXPERTS[name].specs)), pretrained=None)
        with torch.device("meta"), torch.no_grad():
            flops = flops_of(config.build(), torch.empty(1, 3, *config.size))
        expert = prepared(config.build())
        if compile_experts:
            expert.compile()
        views = torch.rand(batch, 3, *config.size, device=place, dtype=kind)
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda e=expert, v=views: e(v),  # type: ignore[misc]
            "published": lambda e=expert, v=views: published.encode(e, v),  # type: ignore[misc]
        }
        if compile_experts:
            expert(views)
        rows += compare(name, ways, flops, batch, backward, meter, peak, rounds, [expert])
        other = stock(expert) if library else None
        del expert, ways
        if other is not None:
            other = prepared(other)
            reference = rows[-1].seconds
            row = compare(
                name, {"library": lambda m=other, v=views: m(v)}, flops, batch, backward, meter, peak, rounds, [other]  # type: ignore[misc]
            )[0]  # fmt: skip
            row.speed_up = reference / row.seconds
            rows.append(row)
            del other
    for tower in [] if towers == "none" else towers.split(","):
        model = composition(tower, tiny)
        with torch.device("meta"), torch.no_grad():
            flops = sum(flops_of(c.build(), torch.empty(1, 3, *c.size)) for c in model.experts.values())
        modules = nn.ModuleDict({name: prepared(config.build()) for name, config in model.experts.items()})
        if compile_experts:
            for module in modules.values():
                module.compile()
        shapes = {name: config.shape for name, config in model.experts.items()}
        mixer = model.branches.overview.mixer.build(shapes)
        side = max(config.size[0] for config in model.experts.values())
        views = torch.rand(batch, 3, side, side, device=place, dtype=kind)
        ways = {
            "ours": lambda m=modules, x=mixer, v=views: x({n: e(v) for n, e in m.items()}).data,  # type: ignore[misc]
            "published": lambda m=modules, x=mixer, v=views: published.concatenated(m, x, v),  # type: ignore[misc]
        }
        rows += compare(tower, ways, flops, batch, backward, meter, peak, rounds, [modules])
        del modules, ways
    after = meter.peak(kind)
    unit = "CPU-s" if place.type == "cpu" else "s"
    if as_json:
        print(json.dumps({"peak_before": peak, "peak_after": after, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    table = Table(title=f"{'forward and backward' if backward else 'forward'}, batch {batch}, {dtype}, {device}")
    for column in ("model", "way", unit, f"images/{unit}", "of peak", "GB beyond weights", "x published", "difference"):
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    for row in rows:
        table.add_row(
            row.model, row.way, f"{row.seconds:.2f}", f"{row.images_per_second:.3f}", f"{row.of_peak:.0%}",
            f"{row.memory_gb:.2f}", "" if row.speed_up is None else f"{row.speed_up:.2f}",
            "" if row.difference is None else f"{row.difference:.0e}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(f"measured matmul peak: {peak / 1e9:.1f} GFLOP per {unit} before, {after / 1e9:.1f} after")


if __name__ == "__main__":
    typer.run(main)
