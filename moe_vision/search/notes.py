"""What a reader of a search's report must know first, in sentences: the report's head and the end of the printed lines.

Every figure names its split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_vision.viz.tables import marked


def interval(gain: Mapping[str, Any]) -> str:
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def told(gain: Mapping[str, Any]) -> str:
    if not gain["distinguishable"]:
        return "not distinguishable"
    return "distinguishable" if gain["mean"] > 0 else "distinguishable, and worse"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Sentences about a search's result, from what results.json holds."""
    return [smaller_set(summary), *random_weights(summary), baselines(summary), *floors(summary), *carriers(summary)]


def smaller_set(summary: Mapping[str, Any]) -> str:
    """Whether a smaller set is as good as the best one."""
    best, equal = summary["best"]["experts"], summary["best"]["cheaper_equal"]
    tried = [entry["experts"] for entry in summary["sets"].values() if len(entry["experts"]) < len(best)]
    if len(best) == 1:
        return "The best set is a single expert: there is no smaller one."
    if not tried:
        return "No smaller set was tried."
    if equal is None:
        return ("On the validation split the best set is distinguishable from the best smaller set of each size that "
                "was tried.")  # fmt: skip
    name, gain = marked(equal["experts"], summary["random_weights"]), equal["gain"]
    verdict = "is better" if gain["distinguishable"] else "is not distinguishable from it"
    return f"**{name}**, which is smaller, {verdict}: the rest gains {interval(gain)} on the validation split."


def random_weights(summary: Mapping[str, Any]) -> Iterator[str]:
    """Which experts began with random weights."""
    for fate, what in (
        ("frozen", "random weights that no stage trains: what such an expert adds says nothing of its architecture"),
        ("trained", "random weights at the start of the first stage"),
    ):
        names = [name for name, own in summary["random_weights"].items() if own == fate]
        if names:
            yield f"**Random weights**: {', '.join(names)} {'has' if len(names) == 1 else 'have'} {what}."


def baselines(summary: Mapping[str, Any]) -> str:
    """What the test score is compared with."""
    known = summary["baselines"]["test"]
    values = ", ".join(f"{name} {'none' if v is None else f'{v:.3f}'}" for name, v in known["value"].items())
    over = known["over_blind"]
    return f"Baselines on the test split: {values}. The images gain {interval(over)} over blind: {told(over)}."


def floors(summary: Mapping[str, Any]) -> Iterator[str]:
    """Tasks that are not better than an answer without a look at the image."""
    for split in ("test", "validation"):
        tasks = summary["baselines"][split]["tasks"]
        low = [f"{task} (best baseline: {entry['best']} {entry['baselines'][entry['best']]:.3f})"
               for task, entry in tasks.items() if entry["verdict"] == "floor"]  # fmt: skip
        if low:
            yield (f"**At the floor on the {split} split**, not distinguishable from the best baseline or below it: "
                   f"{'; '.join(low)}.")  # fmt: skip
        few = [task for task, entry in tasks.items() if entry["verdict"] == "too few images"]
        if few:
            yield f"Too few images on the {split} split to tell from the baselines: {', '.join(few)}."


def carriers(summary: Mapping[str, Any]) -> Iterator[str]:
    """Gains that one task carries."""
    random = summary["random_weights"]
    for number, entry in enumerate(summary["rounds"], start=1):
        gain = next((c["gain"] for c in entry["candidates"] if c["experts"] == entry["chosen"]), None)
        if gain is not None and gain["carried_by"] is not None:
            yield carrier(gain["carried_by"], f"the gain of round {number}", "validation")
        over = entry["over_runner_up"]
        if entry["chosen"] is not None and over is not None and over["carried_by"] is not None:
            lead = f"the lead over {marked(entry['runner_up'], random)} in round {number}"
            yield carrier(over["carried_by"], lead, "validation")
    over = summary["baselines"]["test"]["over_blind"]
    if over["carried_by"] is not None:
        yield carrier(over["carried_by"], "the gain over blind", "test")


def carrier(by: Mapping[str, Any], what: str, split: str) -> str:
    told_of = f"**One task, {by['task']}, carries {what}** on the {split} split: {by['share']:.0%} of it"
    return f"{told_of}; all other tasks gain {interval(by['rest'])}."
