"""What a search found, for people (report.md, pictures) and for scripts (results.json)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_vision.search.notes import interval, notes, told
from moe_vision.search.summary import Found, summarise
from moe_vision.training.checkpoints import write_atomically
from moe_vision.viz.search_pictures import draw_costs, draw_proxy, draw_trace
from moe_vision.viz.tables import markdown_table, marked, plus_minus, scaled


def write_report(found: Found, output: Path) -> dict[str, Any]:
    """report.md, results.json and pictures of a search; returns what results.json holds."""
    summary: dict[str, Any] = json.loads(json.dumps(summarise(found)))
    pictures = output / "pictures"
    pictures.mkdir(exist_ok=True)
    draw_trace(summary, pictures / "rounds.png")
    draw_costs(summary, pictures / "cost.png")
    if summary["proxy"]["tau"] is not None:
        draw_proxy(summary, pictures / "proxy.png")
    write_atomically(output / "results.json", json.dumps(summary, indent=1))
    write_atomically(output / "report.md", report(summary))
    return summary


def report(summary: Mapping[str, Any]) -> str:
    """report.md."""
    best, weights = summary["best"], summary["task_weights"]
    shown = ", ".join(f"{task} {weight:.3f}" for task, weight in weights.items())
    stages = "; ".join(f"{name}: {length(values)}" for name, values in summary["stages"].items())
    random = summary["random_weights"]
    lines = [
        f"# {summary['method'].capitalize()} search over {len(summary['pool'])} experts", "",
        f"**{marked(best['experts'], random)}**: {plus_minus(best['test']['value'])} of the test split, "
        f"{plus_minus(best['validation']['value'])} of the validation split, by which it was chosen "
        f"(exact match, mean over tasks; mean ± sample standard deviation over seeds "
        f"{', '.join(map(str, summary['seeds']))}).", "",
        *[f"- {note}" for note in notes(summary)], "",
        f"Pool: {', '.join(marked([name], random) for name in summary['pool'])}; base: "
        f"{marked(summary['base'], random)}. Each trial: {stages}. "
        f"{summary['items']['validation']} validation items, {summary['items']['test']} test items. "
        f"Weights of tasks: {shown}. {stopping(summary)}", "",
        f"It ended because: {summary['stop']} (on the validation split).", "",
    ]  # fmt: skip
    for number, entry in enumerate(summary["rounds"], start=1):
        lines += round_lines(number, entry, summary)
    lines += [
        "## By task", "",
        *markdown_table(
            ["task", "weight", "validation", "test"],
            [task_row(task, best, weights) for task in {**best["validation"]["by_task"], **best["test"]["by_task"]}],
        ), "",
        *baseline_lines(summary, "test"), *baseline_lines(summary, "validation"),
        *set_lines(summary), *proxy_lines(summary), *READING,
    ]  # fmt: skip
    return "\n".join(lines)


def task_row(task: str, best: Mapping[str, Any], weights: Mapping[str, float]) -> list[str]:
    """A task's weight, if the validation split has it, and its score in each split that does."""
    scores = [best[split]["by_task"].get(task) for split in ("validation", "test")]
    shown = ["none asked" if score is None else plus_minus(score) for score in scores]
    return [task, f"{weights[task]:.3f}" if task in weights else "", *shown]


def baseline_lines(summary: Mapping[str, Any], split: str) -> list[str]:
    """The best set's score of every task of a split beside what answers are worth that need no look at the image."""
    known, best = summary["baselines"][split], summary["best"][split]
    whole = known["value"]
    rows = [["all, weighted", plus_minus(best["value"]), *map(shown_value, whole.values()), "", ""]]
    for task, entry in known["tasks"].items():
        values = [entry["baselines"].get(name) for name in ("blind", "majority", "chance")]
        over = f"{interval(entry['gain'])} over {entry['best']}"
        rows.append(
            [task, plus_minus(best["by_task"][task]), *map(shown_value, values), over, VERDICTS[entry["verdict"]]]
        )
    header = ["task", marked(summary["best"]["experts"], summary["random_weights"]), "blind", "majority", "chance",
              "gain over the best baseline", ""]  # fmt: skip
    return [f"## Baselines on the {split} split", "", *markdown_table(header, rows), ""]


VERDICTS = {"above": "above its baselines", "floor": "at the floor", "too few images": "too few images to tell"}


def shown_value(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


READING = [
    "## How to read this", "",
    "A gain is paired: both sets answered the same items from the same seeds. Intervals are of a bootstrap over "
    "pictures (questions about one picture are drawn together) and seeds; those of a round hold together at 95 % "
    "(Bonferroni). *Not distinguishable* says that the interval holds 0. The validation score of a set that won is "
    "too high by what luck helped it to win; the test split had no say, and its number is the one to quote.", "",
    "*Blind* is the score of the same trained models when each image is replaced by a grey one of its size. *Majority* "
    "always gives the task's most frequent answer in the training data; there is none where no training record has the "
    "task. *Chance* draws one of the task's answers uniformly, of those in the training data and in the split. A task "
    "is *at the floor* where its score is not distinguishable from its best baseline, or below it; the intervals of a "
    "split's tasks hold together at 95 %. One task *carries* a gain where at least half of the gain comes from it and "
    "the rest is not distinguishable from zero. *(random)* marks an expert whose weights are random at the start.", "",
    "![rounds](pictures/rounds.png)", "", "![cost](pictures/cost.png)", "",
]  # fmt: skip


def length(values: Mapping[str, Any]) -> str:
    how = f"{values['epochs']:g} epochs" if values["epochs"] is not None else f"{values['max_steps']} steps"
    return f"{how} in batches of {values['batch_size']}"


def stopping(summary: Mapping[str, Any]) -> str:
    rules = summary["rules"]
    parts = [] if summary["method"] == "exhaustive" else [f"min_gain {rules['min_gain']:g}"]
    parts += [f"max_experts {rules['max_experts']}"] if rules["max_experts"] is not None else []
    parts += [f"gains are divided by what they cost, per {rules['per']}"] if rules["per"] is not None else []
    parts += [f"halving: {summary['halving']}"] if summary["halving"] else []
    return f"Rules: {'; '.join(parts)}." if parts else ""


def round_lines(number: int, entry: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    base, proxied = entry["base"], any(c["proxy"] is not None for c in entry["candidates"])
    random = summary["random_weights"]
    sign = "−" if summary["method"] == "backward" else "+"
    rows = []
    for c in entry["candidates"]:
        whole = not base or summary["method"] == "exhaustive"
        change = marked(c["experts"], random) if whole else sign + marked(c["change"], random)
        row = [f"**{change}**" if c["experts"] == entry["chosen"] else change]
        row += [f"{c['proxy']:.3f}" if c["proxy"] is not None else ""] if proxied else []
        row += [plus_minus(c["value"]) if c["value"] is not None else ""]
        row += [interval(c["gain"]) if c["gain"] is not None else "", f"{c['gain']['p']:.4f}" if c["gain"] else ""]
        row += [said_of(c)]
        rows.append(row)
    header = ["candidate", *(["ridge"] if proxied else []), "validation", "gain over base", "p", ""]
    lines = [
        f"## Round {number}: from {marked(base, random)}, on the validation split",
        "",
        *markdown_table(header, rows),
        "",
        f"{entry['decision']}.",
    ]
    won = next((c for c in entry["candidates"] if c["experts"] == entry["chosen"]), None)
    if won is not None and won["gain"] is not None:
        lines[-1] += f" Its gain is {interval(won['gain'])}: {told(won['gain'])} from the base."
    if won is not None and entry["over_runner_up"] is not None:
        lines[-1] += (f" It is ahead of {marked(entry['runner_up'], random)} by {interval(entry['over_runner_up'])}: "
                      f"{told(entry['over_runner_up'])}.")  # fmt: skip
    return [*lines, ""]


def said_of(candidate: Mapping[str, Any]) -> str:
    if candidate["failed"] is not None:
        return f"failed: {candidate['failed']}"
    if candidate["dropped"] is not None:
        return f"not trained to the end ({candidate['dropped']})"
    return told(candidate["gain"]) if candidate["gain"] is not None else ""


def set_lines(summary: Mapping[str, Any]) -> list[str]:
    """Every set that was tried, the best first."""
    ranked = sorted(summary["sets"].values(), key=lambda entry: -entry["value"]["mean"])
    tasks, random = list(summary["task_weights"]), summary["random_weights"]
    rows = [
        [marked(s["experts"], random), plus_minus(s["value"]), scaled(s["gflops"] * 1e9), str(s["tokens"]),
         *(f"{s['by_task'][task]['mean']:.2f}" for task in tasks)]
        for s in ranked
    ]  # fmt: skip
    return ["## Every set that was tried, on the validation split", "",
            *markdown_table(["set", "all, weighted", "FLOPs", "tokens", *tasks], rows), ""]  # fmt: skip


def proxy_lines(summary: Mapping[str, Any]) -> list[str]:
    proxy = summary["proxy"]
    if not proxy["seen"]:
        return []
    if proxy["tau"] is None:
        return [
            "## Ridge and training",
            "",
            "Fewer than two sets have both scores: their ranks cannot be compared.",
            "",
        ]
    return [
        "## Ridge and training", "",
        f"Kendall's tau between the ranks by ridge and by training on the validation split is {proxy['tau']:.2f} over "
        f"the {len(proxy['sets'])} sets that have both, of {proxy['seen']} that the "
        "proxy saw.", "", "![proxy](pictures/proxy.png)", "",
    ]  # fmt: skip
