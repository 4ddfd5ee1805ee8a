"""Pictures of a search, from what results.json holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moe_vision.viz.tables import marked


def save(figure: Figure, path: Path) -> None:
    # Without a date or a version in it, the same search draws the same file.
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})


def draw_trace(summary: Mapping[str, Any], path: Path) -> None:
    """Rounds to the right, scores up: every candidate with its spread over seeds, those that were chosen joined."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    chosen: list[tuple[float, float]] = []
    for number, entry in enumerate(summary["rounds"], start=1):
        tried = [c for c in entry["candidates"] if c["value"] is not None]
        for place, candidate in enumerate(tried):
            won = candidate["experts"] == entry["chosen"]
            at = number + (0.3 * (place / max(1, len(tried) - 1) - 0.5) if len(tried) > 1 else 0.0)
            axes.errorbar(at, candidate["value"]["mean"], candidate["value"]["spread"] or 0.0, fmt="o", capsize=2,
                          color="tab:blue" if won else "lightgrey")  # fmt: skip
            label = marked(candidate["change"], summary["random_weights"])
            if won or len(tried) <= 6:
                axes.annotate(label, (at, candidate["value"]["mean"]), textcoords="offset points", xytext=(5, 3),
                              fontsize=7)  # fmt: skip
            if won:
                chosen.append((at, candidate["value"]["mean"]))
    axes.plot(*zip(*chosen, strict=True), color="tab:blue", linewidth=1) if chosen else None
    axes.margins(x=0.12)
    axes.set(xlabel="round", ylabel="validation, exact match", xticks=range(1, len(summary["rounds"]) + 1))
    save(figure, path)


def draw_costs(summary: Mapping[str, Any], path: Path) -> None:
    """FLOPs of one image to the right, scores up: every set, and those that no cheaper one beats joined."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    random = summary["random_weights"]
    points = sorted((s["gflops"], s["value"]["mean"], marked(s["experts"], random)) for s in summary["sets"].values())
    front: list[tuple[float, float]] = []
    for gflops, value, name in points:
        on_front = not front or value > front[-1][1]
        axes.plot(gflops, value, "o", color="tab:blue" if on_front else "lightgrey")
        if on_front:
            front.append((gflops, value))
            axes.annotate(name, (gflops, value), textcoords="offset points", xytext=(4, -9), fontsize=7)
    axes.plot(*zip(*front, strict=True), color="tab:blue", linewidth=1) if front else None
    axes.margins(x=0.25)
    axes.set(xlabel="GFLOPs of one image", ylabel="validation, exact match")
    save(figure, path)


def draw_proxy(summary: Mapping[str, Any], path: Path) -> None:
    """What ridge regression says of a set to the right, what training says up."""
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    for name, (ridge, trained) in summary["proxy"]["sets"].items():
        axes.plot(ridge, trained, "o", color="tab:blue")
        name = marked(summary["sets"][name]["experts"], summary["random_weights"])
        axes.annotate(name, (ridge, trained), textcoords="offset points", xytext=(4, 3), fontsize=6)
    axes.set(
        xlabel="ridge, validation", ylabel="trained, validation", title=f"Kendall's tau {summary['proxy']['tau']:.2f}"
    )
    save(figure, path)
