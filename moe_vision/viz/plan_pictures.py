"""Plans to look at: pictures with their slices, the order of these, and the markers between them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from moe_vision.data.records import load_image
from moe_vision.files import replacing
from moe_vision.slicing import Crop, Marker, Pad, Plan, Resize, Segment, Size, View
from moe_vision.slicing.render import render
from moe_vision.viz.plans import Planned
from moe_vision.viz.tables import size

COLOURS = {"slice": "#d62728", "overview": "#1f77b4", "thumbnail": "#2ca02c"}
SHOWN_SIDE = 1024
"""Longest side in pixels at which a picture is drawn."""


def draw_plans(items: Sequence[Planned], path: Path) -> None:
    """Write one PNG with a row for each image: left the image with its views' outlines and numbers, right each view as
    an encoder gets it, in the order of the tokens; below, the tokens.

    Images that were refused are left out. Raises ValueError if none is left.
    """
    drawn = [(item, item.plan) for item in items if item.plan is not None]
    if not drawn:
        raise ValueError("there is no plan to draw: the policy refused every image")
    figure = Figure(figsize=(13, 4.6 * len(drawn)), layout="constrained")
    rows = figure.subfigures(len(drawn), 1, squeeze=False)
    for (item, plan), row in zip(drawn, rows[:, 0], strict=True):
        row.suptitle(f"{item.name}: {plan.policy}, {plan.num_tokens} tokens", fontsize=11)
        whole, parts = row.subfigures(1, 2, width_ratios=(2, 3))
        picture = None if item.picture is None else load_image(item.picture)
        draw_outlines(whole.subplots(), plan, picture)
        draw_views(parts, plan, picture)
        row.supxlabel(sequence(plan), fontsize=8)
    with replacing(path, "image") as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def draw_outlines(axes: Axes, plan: Plan, picture: Image.Image | None) -> None:
    """The image with the outline of every slice, its number, and the marker that follows it."""
    height, width = plan.size
    if picture is not None:
        shown = picture.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        axes.imshow(np.asarray(shown), extent=(0, width, height, 0))
    else:
        axes.add_patch(Rectangle((0, 0), width, height, facecolor="#eeeeee"))
    boxes = [region(view, plan.size) for view in plan.views]
    numbers = iter(enumerate(boxes, 1))
    for i, piece in enumerate(plan.pieces):
        if isinstance(piece, Marker):
            continue
        following = plan.pieces[i + 1] if i + 1 < len(plan.pieces) else None
        for view in piece.views:
            number, (top, left, bottom, right) = next(numbers)
            if view.frame:
                continue
            colour = COLOURS[view.role]
            outline = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.6)
            axes.add_patch(outline)
            if view.role == "slice":
                badge = {"boxstyle": "round", "facecolor": "white", "alpha": 0.75, "edgecolor": colour}
                text = f"{number}" if not isinstance(following, Marker) else f"{number} {label(following)}"
                centre = ((left + right) / 2, (top + bottom) / 2)
                axes.text(*centre, text, ha="center", va="center", color=colour, fontsize=9, bbox=badge)
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    axes.set_xlim(min(0, *lefts), max(width, *rights))
    axes.set_ylim(max(height, *bottoms), min(0, *tops))
    axes.set_aspect("equal")
    axes.set_title(f"{size(plan.size)} pixels", fontsize=9)
    axes.tick_params(labelsize=7)


def draw_views(figure: Any, plan: Plan, picture: Image.Image | None) -> None:
    """Each view as it is encoded, numbered in the order of the tokens; slices in their grid."""
    views, count = plan.views, len(plan.views)
    columns = plan.grid[1] if plan.grid is not None else math.ceil(math.sqrt(count))
    rendered: list[Any] = [None] * count
    if picture is not None:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        rendered = [view.permute(1, 2, 0).numpy() for view in render(pixels, views)]
    slices = [i for i, view in enumerate(views) if view.role == "slice"]
    others = [i for i, view in enumerate(views) if view.role != "slice"]
    rows = math.ceil(len(slices) / columns) + math.ceil(len(others) / columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    # Slices first, each in its place; then the views of the whole image, whatever their number.
    places = [*slices, *([None] * (-len(slices) % columns)), *others]
    for axes, index in zip(grid.flat, places, strict=False):
        if index is None:
            continue
        view = views[index]
        if rendered[index] is not None:
            axes.imshow(rendered[index])
        else:
            axes.add_patch(Rectangle((0, 0), view.size[1], view.size[0], facecolor=COLOURS[view.role], alpha=0.25))
            axes.set_xlim(0, view.size[1])
            axes.set_ylim(view.size[0], 0)
            axes.set_aspect("equal")
        axes.set_title(f"{index + 1} {view.role} {size(view.size)}", fontsize=7, color=COLOURS[view.role])


def region(view: View, image: Size) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) of a view in pixels of the image; beyond its edges where the view has padding."""
    # Each axis as image = scale * view + offset, followed through the steps.
    scale, offset, current = [1.0, 1.0], [0.0, 0.0], image
    for step in view.steps:
        for axis in (0, 1):
            if isinstance(step, Resize):
                scale[axis] *= current[axis] / step.size[axis]
            elif isinstance(step, Pad):
                offset[axis] -= scale[axis] * step.offset[axis]
            elif isinstance(step, Crop):
                offset[axis] += scale[axis] * step.offset[axis]
        current = step.size
    height, width = view.size
    return (offset[0], offset[1], offset[0] + scale[0] * height, offset[1] + scale[1] * width)


def sequence(plan: Plan) -> str:
    """The order of the tokens, as `1:64 ',' 2:64 '\\n' … 7:64`; long ones are cut in the middle."""
    parts, first = [], 1
    for piece in plan.pieces:
        if isinstance(piece, Marker):
            parts.append(label(piece))
        else:
            parts.append(block(piece, first))
            first += len(piece.views)
    if len(parts) > 24:
        parts = [*parts[:14], "…", *parts[-8:]]
    return "order of tokens (view: tokens):  " + "  ".join(parts)


def block(segment: Segment, first: int) -> str:
    last, (rows, columns) = first + len(segment.views) - 1, segment.shape
    numbers = str(first) if last == first else f"{first}-{last}"
    end = "" if segment.row_end is None else f" with {label(segment.row_end)} behind each of {rows} rows"
    return f"{numbers}: {rows * columns}{end}"


def label(marker: Marker) -> str:
    return repr(marker.text) if marker.text is not None else f"[{marker.name}]"
