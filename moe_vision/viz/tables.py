"""Tables for the terminal and for reports."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from moe_vision.terminal import cell

if TYPE_CHECKING:
    from moe_vision.modeling.cost import CostTable, ZooEntry
    from moe_vision.training.plan import PlannedRun


def size(pair: tuple[int, int] | None) -> str:
    return "" if pair is None else f"{pair[0]}x{pair[1]}"


def marked(experts: Iterable[str], random: Collection[str]) -> str:
    """Names of a set of experts; those with random weights are marked."""
    names = [f"{name} (random)" if name in random else name for name in experts]
    return " + ".join(names) or "nothing"


def scaled(number: float, digits: str = ".2f") -> str:
    """A count with a unit that a person reads: 1.30 G."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:{digits}}{unit}"
    return f"{number:.0f}"


def cost_table(costs: "CostTable") -> Table:
    """Parts of a composition with what each costs for one image."""
    table = Table(title="one image, sizes are height x width")
    table.add_column("part", overflow="fold")
    for name in ("input", "grid", "chan.", "params", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in costs.parts:
        table.add_row(
            cell(part.part, "\n", (part.what, "dim")), size(part.image_size), size(part.grid), str(part.channels),
            scaled(part.parameters), scaled(part.flops),
        )  # fmt: skip
    table.add_section()
    table.add_row("total", "", "", "", scaled(costs.parameters), scaled(costs.flops))
    return table


def zoo_table(entries: "Iterable[ZooEntry]") -> Table:
    """Checkpoints of the zoo: what they are, and what one image costs at their own size."""
    table = Table(title="one image at each checkpoint's own size")
    table.add_column("expert, variant, weights, licence, pre-training", overflow="fold")
    for name in ("size", "tokens", "chan.", "params", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        facts = f"{entry.weights}, {entry.licence}; {entry.pretraining}"
        table.add_row(
            cell((entry.expert, "bold"), f" {entry.variant}\n", (facts, "dim")), size(entry.image_size),
            str(entry.tokens), str(entry.channels), scaled(entry.parameters), scaled(entry.flops),
        )  # fmt: skip
    return table


def summary(costs: "CostTable") -> str:
    if costs.size is None:
        return f"{costs.visual_tokens} visual tokens for each image"
    return f"{costs.visual_tokens} visual tokens in {costs.views} views for an image of {size(costs.size)} pixels"


def shortened(path: str) -> str:
    """A path from the working folder where that is shorter."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return min(path, relative, key=len)


def runs_table(runs: "Sequence[PlannedRun]", title: str) -> Table:
    """Runs of a schedule: what trains at which rate, what is frozen, and how much work it is; fits into 80 columns."""
    table = Table(title=cell(title), box=box.SIMPLE_HEAD, show_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for run in runs:
        data = "data of --data" if run.data is None else shortened(run.data)
        counts = (run.steps, run.batch, run.records)
        steps, batch, records = ["?" if value is None else f"{value:,}" for value in counts]
        tokens, flops = ["?" if value is None else scaled(value, ".3g") for value in (run.tokens, run.flops)]
        trains = [f"{group} {scaled(count)} at {rate:g}" for group, (count, rate) in run.trains.items()]
        frozen = [f"{group} {scaled(count)}" for group, count in run.frozen.items()]
        table.add_row(cell((run.name, "bold")), cell(f"{data}, {records} records"))
        table.add_row("  work", f"{steps} steps of {batch}, {tokens} tokens, {flops} FLOPs")
        table.add_row("  trains", cell("\n".join(trains)))
        if run.turns:
            turns = [f"{' + '.join(groups)} {steps} steps" for groups, steps in run.turns]
            table.add_row("  in turn", cell(", ".join(turns)))
        table.add_row("  frozen", cell(", ".join(frozen) or "nothing"), end_section=True)
    return table


def accuracy_table(models: Mapping[str, Mapping[str, float]]) -> Table:
    """Exact match per task, a column for each model."""
    table = Table(title="exact match")
    table.add_column("task")
    for name in models:
        table.add_column(cell(name), justify="right")
    tasks = list(dict.fromkeys(task for scores in models.values() for task in scores))
    for task in tasks:
        table.add_row(cell(task), *(f"{scores[task]:.3f}" if task in scores else "" for scores in models.values()))
    table.add_section()
    table.add_row("average", *(f"{sum(scores.values()) / len(scores):.3f}" for scores in models.values()))
    return table


COMPARED = ("mixer", "accuracy", "tokens", "fusion params", "all params", "FLOPs", "images /s", "tokens /s")
"""Columns of a comparison."""


def plus_minus(value: Mapping[str, Any]) -> str:
    """Mean and, where there is more than one value, spread."""
    return f"{value['mean']:.3f}" + ("" if value["spread"] is None else f" ± {value['spread']:.3f}")


def compared_row(name: str, values: Mapping[str, Any]) -> list[str]:
    """One mixer of a comparison's results, in the order of `COMPARED`."""
    parameters = values["parameters"]
    return [
        name, plus_minus(values["accuracy"]), str(values["visual_tokens"]), scaled(parameters["fusion"], ".3g"),
        scaled(parameters["all"], ".3g"), scaled(values["flops"], ".3g"), f"{values['images_per_second']['mean']:.0f}",
        f"{values['tokens_per_second']['mean']:.0f}",
    ]  # fmt: skip


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """Mixers against each other."""
    seeds = len(summary["seeds"])
    title = f"exact match over {seeds} seed{'s' if seeds > 1 else ''}, FLOPs of one image"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False)  # fits into 80 columns
    for name in COMPARED:
        table.add_column(name.replace(" ", "\n"), justify="left" if name == "mixer" else "right", no_wrap=True)
    for name, values in summary["mixers"].items():
        table.add_row(*map(cell, compared_row(name, values)))
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def micro_table(manifest: Mapping[str, Any]) -> Table:
    """What ships with the package."""
    table = Table(title="miniature experts and language model")
    for name in ("part", "parameters", "steps", "seed", "metrics"):
        table.add_column(name)
    for name, entry in manifest.items():
        metrics = entry.get("held_out") or entry.get("symbolic_accuracy", {})
        shown = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
        table.add_row(cell(name), f"{entry['parameters']:,}", str(entry["steps"]), str(entry["seed"]), shown)
    return table
