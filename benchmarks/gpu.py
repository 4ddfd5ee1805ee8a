"""One page of figures of a GPU: towers, Eagle-X5 end to end, training steps, time to first token, memory.

    python benchmarks/gpu.py -o gpu.json                 # Eagle's sizes in bf16, on a GPU
    python benchmarks/gpu.py --tiny -o gpu.json          # miniature layers on any device, to see that it runs

All weights are random: the cost of a step does not depend on them. A row is the median of several calls after warm-up,
timed with device events on a GPU. `of peak` divides the FLOPs that `moe-vision show` counts by the time and by the best
rate of large matrix products, measured in the same run. timm's models of the same architecture run beside ours.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.evaluation import accelerator
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.cost import cost, flops_of
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.training.groups import freeze_all_but, learning_rates

TIMM_MODELS = {"clip": "vit_large_patch14_clip_336", "convnext": "convnext_xxlarge", "sam": "samvit_large_patch16"}
"""timm's model of the same architecture, where it has one that runs at Eagle's size."""

TINY_LAYERS = {
    "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "convnext": {"hidden_sizes": [8, 16, 24, 48], "depths": [1, 1, 2, 1]},
    "sam": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64,
            "global_attn_indexes": [1]},
    "eva02": {"hidden_size": 32, "depth": 2, "num_heads": 2, "global_blocks": [1]},
    "pix2struct": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "d_kv": 16, "d_ff": 64},
}  # fmt: skip
TINY_LANGUAGE_MODEL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "vocab_size": 1000}  # fmt: skip
TEXT_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One measurement. per_second: images, or tokens in the rows of generation; of_peak: share of the matmul peak;
    memory_gb: peak memory of the call with weights, 0 where it is not known (CPU)."""

    what: str
    how: str
    batch: int
    seconds: float
    per_second: float
    of_peak: float
    memory_gb: float


class Timer:
    """Median time and peak memory of repeated calls on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.on_gpu = device.type == "cuda"

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds and gigabytes of `call`."""
        call()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        call()
        times = [self.once(call) for _ in range(self.repeats)]
        return statistics.median(times), torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else 0.0

    def once(self, call: Callable[[], Any]) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP per second of a large matrix product of random values."""
        side, calls = (8192, 20) if self.on_gpu else (1024, 4)
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))

        def products() -> None:
            for _ in range(calls):
                a @ b

        return 2 * side**3 * calls / self(products)[0]


def random_config(preset: str, tiny: bool) -> ModelConfig:
    """A shipped preset without pre-trained weights; `tiny` makes every layer small and keeps sizes and grids."""
    values = read_yaml(packaged_config(f"model/{preset}.yaml"))
    for name in list(values["experts"]):
        values = apply_override(values, f"experts.{name}.pretrained=null")
        if tiny:
            values["experts"][name] = {**values["experts"][name], "architecture": TINY_LAYERS[name]}
    language = {**values["language_model"], "pretrained": None, "tokenizer": "moe_vision:micro/language_model"}
    if tiny:
        language["architecture"] = {**language["architecture"], **TINY_LANGUAGE_MODEL}
    return validate(ModelConfig, {**values, "language_model": language}, source=preset)


def redraw(module: nn.Module) -> None:
    """Random weights of one scale, drawn on the device: values that are all alike can run faster than real ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(mean=0.0 if parameter.ndim > 1 else 1.0, std=0.02)


def tower_rows(
    config: ModelConfig, options: argparse.Namespace, dtype: torch.dtype, timer: Timer, peak: float
) -> list[Row]:
    """Each expert by itself: eager, timm's model of the same architecture and size, and compiled."""
    rows, batch, tiny = [], options.batch, options.tiny
    for name, expert_config in config.experts.items():
        compiled = name in options.compile.split(",")
        with torch.device("meta"), torch.no_grad():
            flops = flops_of(expert_config.build(), torch.empty(1, 3, *expert_config.size)) * batch
        with timer.device:
            expert: Any = expert_config.build().eval()
        expert = expert.to(timer.device, dtype)
        redraw(expert)
        views = torch.rand(batch, 3, *expert_config.size, device=timer.device, dtype=dtype)
        ways: dict[str, Any] = {"eager": expert}
        if name in TIMM_MODELS and not tiny:
            ways["timm, eager"] = timm_model(name, expert_config.size).to(timer.device, dtype)
        if compiled:
            ways["compiled"] = torch.compile(expert)
        for how, module in ways.items():
            forward = module.forward_features if how.startswith("timm") else module
            with torch.inference_mode():
                seconds, memory = timer(lambda forward=forward, views=views: forward(views))  # type: ignore[misc]
            rows.append(Row(name, how, batch, seconds, batch / seconds, flops / seconds / peak, memory))
            print(rows[-1], flush=True)
        del expert, ways, module, forward
        free(timer)
    return rows


def timm_model(name: str, size: tuple[int, int]) -> Any:
    """timm's model with random weights, in evaluation mode."""
    import timm

    options = {"img_size": size} if name != "convnext" else {}
    model: Any = timm.create_model(TIMM_MODELS[name], num_classes=0, **options)
    redraw(model)
    return model.eval()


def free(timer: Timer) -> None:
    """Give freed memory back, so that the next peak counts only its own."""
    torch.compiler.reset()
    if timer.on_gpu:
        torch.cuda.empty_cache()


def fused_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> MoeVisionForConditionalGeneration:
    """The fused model with random weights, made on the device."""
    with torch.device("meta"):
        model: Any = MoeVisionForConditionalGeneration(config.hf_config(image_token_id=3))
    model = model.to(dtype).to_empty(device=device)
    model.init_weights()
    redraw(model)
    for module in model.modules():  # tables that no checkpoint holds, as those of rotary positions, in fp32
        draw: Any = getattr(module, "init_non_persistent_buffers", None)
        if draw is not None:
            draw()
    return model


def prompt_ids(model: MoeVisionForConditionalGeneration, batch: int, tokens: int) -> torch.Tensor:
    """[B, tokens + TEXT_TOKENS]: placeholders of one image, then text."""
    vocabulary = model.config.text_config.vocab_size
    text = torch.randint(10, vocabulary, (batch, TEXT_TOKENS), device=model.device)
    image = torch.full((batch, tokens), model.config.image_token_id, device=model.device)
    return torch.cat([text[:, :1], image, text[:, 1:]], dim=1)


def training_row(what: str, config: ModelConfig, train: dict[str, float], batch: int, timer: Timer, peak: float) -> Row:
    """One optimizer step on pixels, fp32 weights under bf16 autocast, frozen parts without gradient checkpointing."""
    table = cost(config, text_tokens=TEXT_TOKENS)
    dtype = torch.float32 if "language_model" in train else torch.bfloat16
    model: Any = fused_model(config, timer.device, dtype).train()
    rates = learning_rates(model, train)
    freeze_all_but(model, rates)
    for name in rates:
        part = model.model.multi_modal_projector if name == "adapters" else model.model.language_model
        part.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=timer.on_gpu)
    ids = prompt_ids(model, batch, table.visual_tokens)
    labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - TEXT_TOKENS // 2, -100)
    side = max(max(expert.size) for expert in config.experts.values())
    views = torch.rand(batch, 3, side, side, device=timer.device)
    keep = (labels[:, 1:] != -100).any(0).nonzero().flatten()

    def step() -> None:
        with torch.autocast(timer.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, pixel_values=views, logits_to_keep=keep).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds, memory = timer(step)
    times = {"language_model": 3 if "language_model" in train else 2}
    flops = sum(
        part.flops * (1 if part.part.startswith("experts.") else times.get(part.part, 3)) for part in table.parts
    )
    return Row(
        what, f"train {' + '.join(train)}", batch, seconds, batch / seconds, flops * batch / seconds / peak, memory
    )


def answering_rows(
    what: str, config: ModelConfig, timer: Timer, peak: float, dtype: torch.dtype, largest: int
) -> list[Row]:
    """Image to visual tokens, time to the first token, and each further token, for one image. largest: images of
    the larger batch of the first."""
    table = cost(config, text_tokens=TEXT_TOKENS)
    model: Any = fused_model(config, timer.device, dtype).eval()
    side = max(max(expert.size) for expert in config.experts.values())
    rows = []
    vision = sum(part.flops for part in table.parts if part.part != "language_model")
    for batch in dict.fromkeys((1, largest)):
        views = torch.rand(batch, 3, side, side, device=timer.device, dtype=dtype)
        with torch.inference_mode():
            seconds, memory = timer(lambda views=views: model.get_image_features(views))  # type: ignore[misc]
        rows.append(
            Row(what, "image → tokens", batch, seconds, batch / seconds, vision * batch / seconds / peak, memory)
        )
    ids, views = prompt_ids(model, 1, table.visual_tokens), views[:1]

    def answer(count: int) -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=views, do_sample=False,
                       max_new_tokens=count, min_new_tokens=count, pad_token_id=0)  # fmt: skip

    first, memory = timer(lambda: answer(1))
    rows.append(Row(what, "first token", 1, first, 1 / first, table.flops / first / peak, memory))
    more, memory = timer(lambda: answer(33))
    each = (more - first) / 32
    weights = sum(p.numel() for p in model.model.language_model.parameters()) * 2
    rows.append(Row(what, "each further token", 1, each, 1 / each, weights / each / peak, memory))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--batch", type=int, default=16, help="images of the towers' rows")
    parser.add_argument("--largest", type=int, default=8, help="images of the largest batch of the other rows")
    parser.add_argument(
        "--models", nargs="+", choices=["0.5", "7"], default=["0.5", "7"], help="billions of parameters"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", default="clip", help="experts that torch.compile runs too; ConvNeXt takes minutes")
    parser.add_argument("--tiny", action="store_true", help="miniature layers, to see that everything runs")
    parser.add_argument("--parts", default="towers,answer,train", help="which parts run")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    timer, dtype = Timer(accelerator(), arguments.repeats), torch.bfloat16
    name = torch.cuda.get_device_name() if timer.on_gpu else f"CPU, {torch.get_num_threads()} threads"
    peak = timer.peak(dtype)
    presets = {"0.5": "eagle-x5-small", "7": "eagle-x5"}
    models = {size: random_config(presets[size], arguments.tiny) for size in arguments.models}
    rows: list[Row] = []
    parts = arguments.parts.split(",")
    if "towers" in parts:
        rows += tower_rows(random_config("eagle-x5", arguments.tiny), arguments, dtype, timer, peak)
    for size, config in models.items() if "answer" in parts else ():
        rows += answering_rows(f"X5, {size} B", config, timer, peak, dtype, arguments.largest)
        free(timer)
    trained = {"0.5": ({"adapters": 1e-3, "language_model": 2e-5}, 8), "7": ({"adapters": 1e-3}, 4)}
    for size, config in models.items() if "train" in parts else ():
        rates, batch = trained[size]
        rows.append(training_row(f"X5, {size} B", config, rates, min(batch, arguments.largest), timer, peak))
        free(timer)
    after = timer.peak(dtype)
    report = {"device": name, "torch": torch.__version__, "tiny": arguments.tiny,
              "peak_tflops": [peak / 1e12, after / 1e12], "rows": [asdict(row) for row in rows]}  # fmt: skip
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{name}, bf16, torch {torch.__version__}")
    for column in ("what", "how", "batch", "ms", "per second", "of peak", "GB"):
        table.add_column(column, justify="left" if column in ("what", "how") else "right")
    for row in rows:
        table.add_row(row.what, row.how, str(row.batch), f"{row.seconds * 1000:.1f}", f"{row.per_second:.1f}",
                      f"{row.of_peak:.1%}", f"{row.memory_gb:.1f}")  # fmt: skip
    Console(width=100).print(table)
    print(f"matmul peak, bf16: {peak / 1e12:.0f} TFLOP/s before, {after / 1e12:.0f} after")


if __name__ == "__main__":
    main()
