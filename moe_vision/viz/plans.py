"""Plans to read: what the command line names, its views and tokens, in a table."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_vision.data.records import image_size
from moe_vision.slicing import Plan, PlanError, Size, SlicingPolicy, View
from moe_vision.terminal import cell
from moe_vision.viz.tables import size

SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")


@dataclass(frozen=True)
class Planned:
    """One image and its plan, or why there is none. picture: its file, where it has one."""

    name: str
    size: Size
    plan: Plan | None = None
    error: str | None = None
    picture: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.plan is None:
            return {"size_hw": list(self.size), "error": self.error}
        return self.plan.to_dict()


def plan_all(
    images: Sequence[str], policy: SlicingPolicy, images_per_prompt: int = 1, frames: int | None = None
) -> list[Planned]:
    """Plan every size (HEIGHTxWIDTH) or picture, of which only headers are read; frames: as videos of so many.

    Raises ValueError, before anything is planned, for what is neither, and for both kinds of number at once.
    """
    if frames is not None and images_per_prompt != 1:
        raise ValueError(f"{frames} frames and {images_per_prompt} images per prompt: give one of them")
    found = [
        Planned(text, parse_size(text)) if SIZE.fullmatch(text) else Planned(text, of_file(text), picture=Path(text))
        for text in images
    ]
    planned = []
    for item in found:
        plan, error = None, None
        try:
            plan = policy.plan(item.size, images_per_prompt) if frames is None else policy.plan_video(item.size, frames)
        except PlanError as refused:
            error = str(refused)
        planned.append(Planned(item.name, item.size, plan, error, item.picture))
    return planned


def parse_size(text: str) -> Size:
    """HEIGHTxWIDTH in pixels. Raises ValueError."""
    if (match := SIZE.fullmatch(text)) is None:
        raise ValueError(f"size '{text}': write HEIGHTxWIDTH in pixels, as 672x1008")
    return (int(match[1]), int(match[2]))


def of_file(text: str) -> Size:
    """(height, width) of a picture. Raises ValueError."""
    if not Path(text).exists():
        raise ValueError(f"'{text}' is neither a size (HEIGHTxWIDTH, as 672x1008) nor a picture that exists")
    return image_size(text)


def plan_table(items: Iterable[Planned], policy: str) -> Table:
    """Views, grid and tokens of each image."""
    table = Table(title=f"slicing {policy}; sizes are height x width, grids rows x columns")
    table.add_column("image", overflow="fold")
    table.add_column("views, in the order of their tokens", overflow="fold")
    for name in ("grid", "visual", "markers", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in items:
        plan = item.plan
        label: str | Text = size(item.size)
        if item.name != label:
            label = cell(item.name, "\n", (size(item.size), "dim"))
        if plan is None:
            table.add_row(label, cell((item.error or "", "red")), "", "", "", "")
            continue
        table.add_row(
            label, "\n".join(runs(plan.views)), size(plan.grid), str(plan.num_visual_tokens),
            str(plan.num_marker_tokens), str(plan.num_tokens),
        )  # fmt: skip
    return table


def runs(views: Sequence[View]) -> list[str]:
    """Views with equal neighbours counted together: `6 slices of 336x336`."""
    found: list[tuple[str, Size, int]] = []
    for view in views:
        if found and found[-1][:2] == (view.role, view.size):
            found[-1] = (view.role, view.size, found[-1][2] + 1)
        else:
            found.append((view.role, view.size, 1))
    return [f"{number} {role}{'s' if number > 1 else ''} of {size(pixels)}" for role, pixels, number in found]
