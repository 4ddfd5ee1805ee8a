"""Curves of a run as a picture, drawn from its metrics file."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_vision.training.checkpoints import write_atomically

PANELS = {"loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient norm before clipping"}
"""What is drawn, by the name of its metric; `NAME/GROUP` is a curve of the same panel."""


def curves(logs: Sequence[Mapping[str, Any]], run: str) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values of each curve of a run, by panel and name: the groups where a metric is known by group, else the
    whole."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {panel: {} for panel in PANELS}
    for log in logs:
        if log["run"] != run:
            continue
        for key, value in log.items():
            metric, _, group = key.partition("/")
            if metric in found:
                steps, values = found[metric].setdefault(group or "all", ([], []))
                steps.append(log["step"])
                values.append(value)
    if len(found["learning_rate"]) > 1:  # the whole's rate is that of whichever group comes first
        found["learning_rate"].pop("all", None)
    return found


def draw(logs: Sequence[Mapping[str, Any]], run: str) -> Figure:
    """One panel below another, on one axis of steps."""
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, (metric, named) in zip(panels, curves(logs, run).items(), strict=True):
        for name, (steps, values) in named.items():
            axes.plot(steps, values, label=name, marker="." if len(steps) < 50 else None)
        axes.set_ylabel(PANELS[metric])
        axes.grid(alpha=0.3)
        if len(named) > 1:
            axes.legend(fontsize="small")
    panels[0].set_title(run)
    panels[-1].set_xlabel("step")
    return figure


def write_curves(metrics: Path, run: str, folder: Path) -> None:
    """Write folder/RUN.png from a metrics file."""
    logs = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    picture = io.BytesIO()
    draw(logs, run).savefig(picture, format="png", dpi=100)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{run}.png", picture.getvalue())
