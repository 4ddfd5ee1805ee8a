"""What a search found, for people (report.md, pictures) and for scripts (results.json).

Nothing in it depends on when or where the search ran, so that one that was killed and went on reports the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_vision.evaluation import over_seeds
from moe_vision.modeling.cost import CostTable
from moe_vision.search.config import SearchConfig
from moe_vision.search.methods import Candidate, Dropped, Experts, Failed, Round, Scored, Trace
from moe_vision.search.statistics import Gain, Metric, kendall_tau
from moe_vision.training.checkpoints import write_atomically
from moe_vision.viz.search_pictures import draw_costs, draw_proxy, draw_trace
from moe_vision.viz.tables import markdown_table, plus_minus, scaled


@dataclass(frozen=True)
class Found:
    """A finished search. answers: [seeds, items] of each set that was tried to the end; proxied: [1, items]; test:
    [seeds, test items] of the best set."""

    config: SearchConfig
    trace: Trace
    pool: Experts
    answers: Mapping[Experts, torch.Tensor]
    proxied: Mapping[Experts, torch.Tensor]
    costs: Mapping[Experts, CostTable]
    test: torch.Tensor
    validation_metric: Metric
    test_metric: Metric
    counts: Mapping[str, int]


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


def named(experts: Sequence[str]) -> str:
    return " + ".join(experts) or "nothing"


def summarise(found: Found) -> dict[str, Any]:
    """Plain values of the whole search."""
    best, metric = found.trace.best[0], found.validation_metric
    config = found.config
    return {
        "method": config.method, "pool": list(found.pool), "base": list(config.base_experts),
        "seeds": [config.seed + number for number in range(config.seeds)],
        "items": dict(found.counts), "task_weights": dict(zip(metric.tasks, metric.weights.tolist(), strict=True)),
        "rules": {"min_gain": config.min_gain or 0.0, "max_experts": config.max_experts, "per": config.per},
        "stages": {stage.name: stage.model_dump(mode="json", include={"epochs", "max_steps", "batch_size"})
                   for stage in config.stages},
        "halving": [rung.model_dump() for rung in config.halving],
        "rounds": [summary_of_round(found, entry) for entry in found.trace.rounds],
        "path": [{"experts": list(experts), "value": value} for experts, value in found.trace.path],
        "stop": found.trace.stop,
        "best": {
            "experts": list(best), "validation": scores(metric, found.answers[best]),
            "test": scores(found.test_metric, found.test), "cheaper_equal": cheaper_equal(found),
        },
        "sets": {named(experts): {"experts": list(experts), **scores(metric, answers), **cost_of(found, experts)}
                 for experts, answers in found.answers.items()},
        "proxy": summary_of_proxy(found),
    }  # fmt: skip


def scores(metric: Metric, right: torch.Tensor) -> dict[str, Any]:
    """Weighted mean and shares by task of answers [seeds, items], over seeds."""
    shares = metric.by_task(right)
    by_task = {task: over_seeds(shares[:, i].tolist()) for i, task in enumerate(metric.tasks)}
    return {"value": over_seeds(metric.values(right)), "by_task": by_task}


def cost_of(found: Found, experts: Experts) -> dict[str, Any]:
    costs = found.costs[experts]
    return {"gflops": costs.flops / 1e9, "tokens": costs.visual_tokens, "parameters": costs.parameters}


def plain(gain: Gain | None) -> dict[str, Any] | None:
    if gain is None:
        return None
    return {**vars(gain), "distinguishable": gain.distinguishable}


def summary_of_round(found: Found, entry: Round) -> dict[str, Any]:
    """Candidates with their scores, gains over the base, and the winner's over the runner-up."""
    scored = [c for c in entry.candidates if isinstance(c.outcome, Scored)]
    start = found.answers.get(entry.base)
    gains = {
        c.experts: found.validation_metric.gain(found.answers[c.experts], start, len(scored))
        for c in scored
        if start is not None and found.trace.method != "exhaustive"
    }
    ranked = sorted(scored, key=lambda c: -(c.value or 0.0))
    runner_up, over = None, None
    first = entry.chosen or (ranked[0] if ranked else None)
    others = [c for c in ranked if first is not None and c.experts != first.experts]
    if first is not None and others:
        runner_up = others[0]
        over = found.validation_metric.gain(found.answers[first.experts], found.answers[runner_up.experts])
    return {
        "base": list(entry.base), "decision": entry.decision,
        "chosen": None if entry.chosen is None else list(entry.chosen.experts),
        "runner_up": None if runner_up is None else list(runner_up.experts), "over_runner_up": plain(over),
        "candidates": [summary_of_candidate(found, c, gains.get(c.experts)) for c in entry.candidates],
    }  # fmt: skip


def summary_of_candidate(found: Found, candidate: Candidate, gain: Gain | None) -> dict[str, Any]:
    experts, outcome = candidate.experts, candidate.outcome
    proxied, answers = found.proxied.get(experts), found.answers.get(experts)
    return {
        "experts": list(experts), "change": list(candidate.change),
        "proxy": None if proxied is None else found.validation_metric.value(proxied),
        "value": None if answers is None else over_seeds(found.validation_metric.values(answers)),
        "gain": plain(gain),
        "failed": outcome.reason.splitlines()[0] if isinstance(outcome, Failed) else None,
        "dropped": outcome.reason if isinstance(outcome, Dropped) else None,
    }  # fmt: skip


def cheaper_equal(found: Found) -> dict[str, Any] | None:
    """The smallest set that cannot be told from the best one, among the best that were tried of each smaller size."""
    best = found.trace.best[0]
    for size in range(1, len(best)):
        tried = [experts for experts in found.answers if len(experts) == size]
        if not tried:
            continue
        experts = max(tried, key=lambda experts: found.validation_metric.value(found.answers[experts]))
        gain = found.validation_metric.gain(found.answers[best], found.answers[experts])
        if not gain.distinguishable:
            return {"experts": list(experts), "gain": plain(gain)}
    return None


def summary_of_proxy(found: Found) -> dict[str, Any]:
    """Both values of every set that has them, and how well their ranks agree."""
    metric = found.validation_metric
    both = {e: (metric.value(found.proxied[e]), metric.value(found.answers[e]))
            for e in found.answers if e in found.proxied}  # fmt: skip
    ranks = [list(values) for values in zip(*both.values(), strict=True)]
    varied = len(both) > 1 and all(len(set(values)) > 1 for values in ranks)
    return {
        "sets": {named(experts): values for experts, values in both.items()},
        "seen": len(found.proxied), "tau": kendall_tau(ranks[0], ranks[1]) if varied else None,
        "keep": None if found.config.proxy is None else found.config.proxy.keep,
    }  # fmt: skip


def report(summary: Mapping[str, Any]) -> str:
    """report.md."""
    best, weights = summary["best"], summary["task_weights"]
    shown = ", ".join(f"{task} {weight:.3f}" for task, weight in weights.items())
    stages = "; ".join(f"{name}: {length(values)}" for name, values in summary["stages"].items())
    lines = [
        f"# {summary['method'].capitalize()} search over {len(summary['pool'])} experts", "",
        f"**{named(best['experts'])}**: {plus_minus(best['test']['value'])} of the test split, "
        f"{plus_minus(best['validation']['value'])} of the validation split, by which it was chosen "
        f"(exact match, mean over tasks; mean ± sample standard deviation over seeds "
        f"{', '.join(map(str, summary['seeds']))}).", "",
        *best_lines(summary), "",
        f"Pool: {', '.join(summary['pool'])}; base: {named(summary['base'])}. Each trial: {stages}. "
        f"{summary['items']['validation']} validation items, {summary['items']['test']} test items. "
        f"Weights of tasks: {shown}. {stopping(summary)}", "",
        f"It ended because: {summary['stop']}.", "",
    ]  # fmt: skip
    for number, entry in enumerate(summary["rounds"], start=1):
        lines += round_lines(number, entry, summary)
    lines += [
        "## By task", "",
        *markdown_table(
            ["task", "weight", "validation", "test"],
            [task_row(task, best, weights) for task in {**best["validation"]["by_task"], **best["test"]["by_task"]}],
        ), "",
        *set_lines(summary), *proxy_lines(summary), *READING,
    ]  # fmt: skip
    return "\n".join(lines)


def task_row(task: str, best: Mapping[str, Any], weights: Mapping[str, float]) -> list[str]:
    """A task's weight, if the validation split has it, and its score in each split that does."""
    scores = [best[split]["by_task"].get(task) for split in ("validation", "test")]
    shown = ["none asked" if score is None else plus_minus(score) for score in scores]
    return [task, f"{weights[task]:.3f}" if task in weights else "", *shown]


READING = [
    "## How to read this", "",
    "A gain is paired: both sets answered the same items from the same seeds. Intervals are of a bootstrap over "
    "pictures (questions about one picture are drawn together) and seeds; those of a round hold together at 95 % "
    "(Bonferroni). *Not distinguishable* says that the interval holds 0. The validation score of a set that won is "
    "too high by what luck helped it to win; the test split had no say, and its number is the one to quote.", "",
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


def best_lines(summary: Mapping[str, Any]) -> list[str]:
    equal = summary["best"]["cheaper_equal"]
    if equal is None:
        return ["No smaller set that was tried is as good within the uncertainty."]
    return [f"**{named(equal['experts'])}**, which is smaller, is not distinguishable from it: the gain of the rest is "
            f"{interval(equal['gain'])}."]  # fmt: skip


def interval(gain: Mapping[str, Any]) -> str:
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def round_lines(number: int, entry: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    base, proxied = entry["base"], any(c["proxy"] is not None for c in entry["candidates"])
    sign = "−" if summary["method"] == "backward" else "+"
    rows = []
    for c in entry["candidates"]:
        change = named(c["experts"]) if not base or summary["method"] == "exhaustive" else sign + " ".join(c["change"])
        row = [f"**{change}**" if c["experts"] == entry["chosen"] else change]
        row += [f"{c['proxy']:.3f}" if c["proxy"] is not None else ""] if proxied else []
        row += [plus_minus(c["value"]) if c["value"] is not None else ""]
        row += [interval(c["gain"]) if c["gain"] is not None else "", f"{c['gain']['p']:.4f}" if c["gain"] else ""]
        row += [said_of(c)]
        rows.append(row)
    header = ["candidate", *(["ridge"] if proxied else []), "validation", "gain over base", "p", ""]
    lines = [f"## Round {number}: from {named(base)}", "", *markdown_table(header, rows), "", f"{entry['decision']}."]
    won = next((c for c in entry["candidates"] if c["experts"] == entry["chosen"]), None)
    if won is not None and won["gain"] is not None:
        lines[-1] += f" Its gain is {interval(won['gain'])}: {told(won['gain'])} from the base."
    if won is not None and entry["over_runner_up"] is not None:
        lines[-1] += (f" It is ahead of {named(entry['runner_up'])} by {interval(entry['over_runner_up'])}: "
                      f"{told(entry['over_runner_up'])}.")  # fmt: skip
    return [*lines, ""]


def told(gain: Mapping[str, Any]) -> str:
    if not gain["distinguishable"]:
        return "not distinguishable"
    return "distinguishable" if gain["mean"] > 0 else "distinguishable, and worse"


def said_of(candidate: Mapping[str, Any]) -> str:
    if candidate["failed"] is not None:
        return f"failed: {candidate['failed']}"
    if candidate["dropped"] is not None:
        return f"not trained to the end ({candidate['dropped']})"
    return told(candidate["gain"]) if candidate["gain"] is not None else ""


def set_lines(summary: Mapping[str, Any]) -> list[str]:
    """Every set that was tried, the best first."""
    ranked = sorted(summary["sets"].items(), key=lambda item: -item[1]["value"]["mean"])
    tasks = list(summary["task_weights"])
    rows = [
        [name, plus_minus(s["value"]), scaled(s["gflops"] * 1e9), str(s["tokens"]),
         *(f"{s['by_task'][task]['mean']:.2f}" for task in tasks)]
        for name, s in ranked
    ]  # fmt: skip
    return ["## Every set that was tried", "",
            *markdown_table(["set", "validation", "FLOPs", "tokens", *tasks], rows), ""]  # fmt: skip


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
        f"Kendall's tau between the ranks by ridge and by training is {proxy['tau']:.2f} over the {len(proxy['sets'])} "
        f"sets that have both, of {proxy['seen']} that the proxy saw.", "", "![proxy](pictures/proxy.png)", "",
    ]  # fmt: skip
