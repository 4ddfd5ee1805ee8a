"""Pre-train each miniature expert from nothing, with an objective of its own kind.

| expert     | objective on generated scenes                           | after                                |
|------------|---------------------------------------------------------|--------------------------------------|
| clip       | picture-caption contrast, softmax over the batch        | CLIP (Radford et al., 2021)          |
| siglip     | picture-caption contrast, sigmoid of each pair          | SigLIP (Zhai et al., 2023)           |
| convnext   | texture and kind of every cell                          | supervised ConvNeXt (Liu et al., 2022) |
| pix2struct | digits and bars of every cell                           | screenshot parsing (Lee et al., 2023) |
| eva02      | shape, colour and kind of every cell                    | detection (Fang et al., 2023)        |
| sam        | foreground mask, and blob size of every cell            | segmentation (Kirillov et al., 2023) |
| dinov3     | a teacher's prototypes, no labels (`distillation.py`)   | DINOv3 (Siméoni et al., 2025)        |
| radio      | maps of the five experts above (`distillation.py`)      | RADIO (Ranzinger et al., 2024)       |
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from moe_vision.data.synthetic.scene import CELLS_PER_SIDE
from moe_vision.experts import EXPERTS, Expert
from moe_vision.files import give_usual_modes
from moe_vision.recipes.distillation import Agglomeration, SelfDistillation
from moe_vision.recipes.pictures import FIELDS, IGNORED, Pictures, pooled_cells
from moe_vision.recipes.symbols import OFFSETS


@dataclass(frozen=True)
class Recipe:
    """One expert's objective. fields: what its head reads in every cell. contrast: with captions, by this loss.
    mask: also predict the foreground. kind: labels are read from the scene, or there are none.
    """

    fields: tuple[str, ...] = ()
    contrast: Literal["softmax", "sigmoid"] | None = None
    mask: bool = False
    kind: Literal["labelled", "self_distilled", "agglomerated"] = "labelled"
    steps: int = 600
    batch_size: int = 48
    learning_rate: float = 1.5e-3


RECIPES: Mapping[str, Recipe] = {
    "clip": Recipe(contrast="softmax", steps=500, batch_size=96),
    "convnext": Recipe(fields=("kind", "texture", "shape"), steps=400, batch_size=32, learning_rate=2e-3),
    "pix2struct": Recipe(fields=("kind", "digit0", "digit1", "digit2", "bar0", "bar1", "bar2"), steps=1000),
    "eva02": Recipe(fields=("kind", "shape", "colour"), steps=500),
    "sam": Recipe(fields=("kind", "blob"), mask=True, steps=400),
    "siglip": Recipe(contrast="sigmoid", steps=1500, batch_size=96, learning_rate=3e-3),
    "dinov3": Recipe(kind="self_distilled", steps=1000),
    "radio": Recipe(kind="agglomerated", steps=1000),
}


class Objective(nn.Module):
    """Heads on one expert's map, trained by what the scene says; thrown away after training."""

    def __init__(self, recipe: Recipe, expert: Expert) -> None:
        super().__init__()
        self.recipe = recipe
        channels, side = expert.config.channels, expert.config.shape.grid[0]
        cells_channels = channels * (side // CELLS_PER_SIDE) ** 2
        self.trunk = nn.Sequential(nn.LayerNorm(cells_channels), nn.Linear(cells_channels, 128), nn.GELU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, FIELDS[name][1]) for name in recipe.fields})
        if recipe.mask:
            self.mask = nn.Conv2d(channels, 16, 1)
        if recipe.contrast:
            self.words = nn.EmbeddingBag(OFFSETS["total"], 64, mode="sum", padding_idx=0)
            self.text = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            self.image = nn.Linear(128, 64)
            self.temperature = nn.Parameter(torch.tensor(2.0))
        if recipe.contrast == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, expert: Expert, pictures: Pictures, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and metrics of the pictures `rows`."""
        data = expert(pictures.views(rows)).data
        cells = self.trunk(pooled_cells(data))
        losses, metrics = [], {}
        for name, head in self.heads.items():
            logits, target = head(cells).flatten(0, 1), pictures.field(rows, name).flatten()
            losses.append(F.cross_entropy(logits, target, ignore_index=IGNORED))
            wanted = target != IGNORED
            metrics[name] = (logits.argmax(-1) == target)[wanted].float().mean().item()
        if self.recipe.mask:
            views = pictures.views(rows)
            away = (views - views.amax(dim=(2, 3), keepdim=True)).abs().amax(1, keepdim=True)
            target = F.avg_pool2d((away > 0.04).float(), 4).round()
            logits = F.pixel_shuffle(self.mask(data), 4)
            losses.append(F.binary_cross_entropy_with_logits(logits, target))
            found = logits > 0
            metrics["mask_iou"] = ((found & (target > 0)).sum() / (found | (target > 0)).sum().clamp(min=1)).item()
        if self.recipe.contrast:
            # Words of every cell with its place, as in a caption that names them all.
            facts = pictures.facts[rows]
            text = self.text(self.words(facts.flatten(0, 1)).unflatten(0, facts.shape[:2])).mean(1)
            image = self.image(cells).mean(1)
            scores = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * self.temperature.exp()
            target = torch.arange(len(rows))
            if self.recipe.contrast == "sigmoid":
                pairs = 2 * torch.eye(len(rows)) - 1
                losses.append(-F.logsigmoid(pairs * (scores + self.bias)).sum() / len(rows))
            else:
                losses.append((F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2)
            metrics["recall_at_1"] = (scores.argmax(-1) == target).float().mean().item()
        return torch.stack(losses).sum(), metrics


def objective_of(recipe: Recipe, expert: Expert) -> nn.Module:
    """What trains an expert: takes (expert, pictures, rows), returns its loss and metrics."""
    if recipe.kind == "self_distilled":
        return SelfDistillation(expert)
    return Agglomeration(expert) if recipe.kind == "agglomerated" else Objective(recipe, expert)


def pretrain(
    name: str, output: Path, pictures: Pictures, held_out: Pictures, *, seed: int = 0, steps: int | None = None
) -> dict[str, Any]:
    """Train expert `name`, write `output`/<name>.safetensors in fp16, and return its metrics on held-out pictures."""
    torch.manual_seed(seed)
    recipe = RECIPES[name]
    steps = steps or recipe.steps
    expert: Expert = EXPERTS[name](variant="micro", pretrained=None).build()
    objective = objective_of(recipe, expert)
    parameters = [*expert.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(pictures), (recipe.batch_size,), generator=generator)
        loss, metrics = objective(expert, pictures, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            shown = " ".join(f"{key} {value:.2f}" for key, value in metrics.items())
            elapsed = time.perf_counter() - started
            print(f"{name} step {step} loss {loss.item():.3f} {shown} {elapsed:.0f} s", flush=True)
    expert.eval(), objective.eval()
    with torch.no_grad():
        rows = torch.arange(len(held_out))
        _, metrics = objective(expert, held_out, rows)
    output.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half() for key, value in expert.state_dict().items()}, output / f"{name}.safetensors")
    give_usual_modes(output / f"{name}.safetensors")
    return {
        "seed": seed,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in expert.parameters()),
        "held_out": {key: round(value, 3) for key, value in metrics.items()},
    }
