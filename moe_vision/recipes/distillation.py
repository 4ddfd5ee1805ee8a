"""Objectives without labels: an expert learns from a running average of itself, or from other experts.

pictures ─┬─ two disturbed copies ─ student, teacher ─ prototypes ─ cross-entropy     SelfDistillation
          └─ frozen experts' maps ─ student, one head each ─ cosine distance          Agglomeration

Neither reads a scene's facts while it trains. The metrics do: `probe_…` is the held-out accuracy of a linear read-out.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from moe_vision.experts import EXPERTS, Expert
from moe_vision.experts.weights import load_expert_weights
from moe_vision.recipes.pictures import FIELDS, IGNORED, Pictures, pooled_cells

TEACHERS = ("clip", "convnext", "pix2struct", "eva02", "sam")
"""The labelled experts of this package: what RADIO's miniature is distilled from."""

PROBED = ("kind", "shape", "colour", "texture")


class SelfDistillation(nn.Module):
    """DINOv3's objective in miniature (Siméoni et al., 2025; Oquab et al., 2023), on every patch.

    The teacher is the running average of the student and sees the whole picture. The student sees another disturbed
    copy, with some patches blanked, and predicts the teacher's soft choice among `prototypes`. Sinkhorn-Knopp balances
    the choices, so that not all patches get the same one.
    """

    teacher_temperature, student_temperature, blanked = 0.05, 0.1, 0.3

    def __init__(self, expert: Expert, prototypes: int = 256) -> None:
        super().__init__()
        channels = expert.config.channels
        self.head = nn.Sequential(
            nn.Linear(channels, 128), nn.GELU(), nn.Linear(128, 64), UnitLength(), nn.Linear(64, prototypes, bias=False)
        )
        self.teacher = copy.deepcopy(nn.ModuleList([expert, self.head])).requires_grad_(False)
        self.steps = 0

    def forward(self, expert: Expert, pictures: Pictures, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and metrics of the pictures `rows`; in training the teacher first moves towards the student."""
        if not self.training:
            return torch.zeros(()), probes(expert, pictures, rows)
        self.follow(expert)
        views = pictures.views(rows)
        grid = expert.config.shape.grid
        with torch.no_grad():
            seen = self.teacher[0](disturbed(views)).data.flatten(2).transpose(1, 2)
            target = balanced(self.teacher[1](seen).flatten(0, 1) / self.teacher_temperature)
        hidden = torch.rand(len(rows), 1, *grid) < self.blanked
        blank = F.interpolate(hidden.float(), views.shape[-2:])
        data = expert(disturbed(views).lerp(views.mean(dim=(2, 3), keepdim=True), blank)).data
        logits = self.head(data.flatten(2).transpose(1, 2)).flatten(0, 1) / self.student_temperature
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        agreement = (logits.argmax(-1) == target.argmax(-1)).float().mean().item()
        return loss, {"agreement": agreement, "prototypes": float(len(target.argmax(-1).unique()))}

    @torch.no_grad()
    def follow(self, expert: Expert) -> None:
        """Move the teacher's weights towards the student's, more slowly as training proceeds."""
        self.steps += 1
        momentum = min(1 - 1 / self.steps, 0.99)
        students = nn.ModuleList([expert, self.head])
        for average, parameter in zip(self.teacher.parameters(), students.parameters(), strict=True):
            average.lerp_(parameter, 1 - momentum)


class UnitLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


def disturbed(views: torch.Tensor) -> torch.Tensor:
    """Views [V, 3, H, W] with another brightness, contrast and noise each."""
    contrast = torch.empty(len(views), 1, 1, 1).uniform_(0.8, 1.2)
    brightness = torch.empty(len(views), 1, 1, 1).uniform_(-0.1, 0.1)
    return ((views - 0.5) * contrast + 0.5 + brightness + 0.02 * torch.randn_like(views)).clamp(0, 1)


def balanced(scores: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """Scores [N, K] → rows that sum to one, with all columns used alike (Sinkhorn-Knopp)."""
    shares = (scores - scores.max()).exp()
    for _ in range(rounds):
        shares = shares / shares.sum(0, keepdim=True).clamp(min=1e-12)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-12)
    return shares


class Agglomeration(nn.Module):
    """RADIO's objective in miniature (Ranzinger et al., 2024): one map from which a head each tells the teachers' maps.

    Teachers are the shipped experts, frozen, each at its own input size; their maps are standardised by channel.
    """

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        teachers: dict[str, Expert] = {}
        for name in TEACHERS:
            teachers[name] = EXPERTS[name](variant="micro").build()
            load_expert_weights(teachers[name], "default")
        self.teachers = nn.ModuleDict(teachers).eval().requires_grad_(False)
        channels = expert.config.channels
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(channels, 128, 1), nn.GELU(), nn.Conv2d(128, teacher.config.channels, 1))
                for name, teacher in teachers.items()
            }
        )

    def train(self, mode: bool = True) -> "Agglomeration":
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(self, expert: Expert, pictures: Pictures, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and the cosine with each teacher, over the pictures `rows`."""
        views = pictures.views(rows)
        data = expert(views).data
        losses, metrics = [], {}
        for name, head in self.heads.items():
            with torch.no_grad():
                target = self.teachers[name](views).data
                deviation, mean = torch.std_mean(target, dim=(0, 2, 3), keepdim=True)
                target = (target - mean) / deviation.clamp(min=1e-3)
            found = F.adaptive_avg_pool2d(head(data), target.shape[-2:])
            cosine = F.cosine_similarity(found, target, dim=1).mean()
            losses.append(1 - cosine + 0.1 * F.smooth_l1_loss(found, target))
            metrics[f"cosine_{name}"] = cosine.item()
        if not self.training:
            metrics |= probes(expert, pictures, rows)
        return torch.stack(losses).sum(), metrics


@torch.no_grad()
def probes(expert: Expert, pictures: Pictures, rows: torch.Tensor) -> dict[str, float]:
    """Accuracy of a linear read-out of the cells' fields: fitted to half of the pictures, measured on the rest."""
    cells = pooled_cells(expert(pictures.views(rows)).data).double()
    cells = torch.cat([cells, torch.ones_like(cells[..., :1])], dim=-1)
    half, accuracies = len(rows) // 2, {}
    for name in PROBED:
        classes = FIELDS[name][1]
        target = pictures.field(rows, name)
        train, test = target[:half] != IGNORED, target[half:] != IGNORED
        seen, wanted = cells[:half][train], F.one_hot(target[:half][train], classes).double()
        ridge = 1e-2 * torch.eye(seen.shape[1], dtype=seen.dtype) * len(seen)
        weights = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ wanted)
        hits = (cells[half:][test] @ weights).argmax(-1) == target[half:][test]
        accuracies[f"probe_{name}"] = hits.double().mean().item()
    return accuracies
