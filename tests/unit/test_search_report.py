"""What a search's report says beside its scores: baselines, tasks at the floor, what carries a gain, random weights.

Answers are constructed, so that every figure can be computed by hand.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from moe_vision.config import validate
from moe_vision.data.records import Record, Turn, load_records
from moe_vision.evaluation import EvalReport, Prediction
from moe_vision.search import SearchConfig, executors, jobs, planned_search, search
from moe_vision.search.baselines import answer_counts, baselines_of, carried, floors
from moe_vision.search.jobs import Job, Result, grey_image
from moe_vision.search.notes import notes, smaller_set
from moe_vision.search.statistics import Metric
from tests.unit.toy_search import QUIET, journal, search_values

Answers = Callable[[Job, Record], bool]


def write_split(folder: Path, colours: list[str], dark: list[str]) -> Path:
    """One question an image: its colour, then whether it is dark."""
    folder.mkdir(parents=True)
    records = []
    for number, (task, answer) in enumerate([*(("colour", c) for c in colours), *(("dark", d) for d in dark)]):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        question = {"from": "human", "value": f"<image>\n{'which colour' if task == 'colour' else 'is it black'}"}
        turns = [question, {"from": "gpt", "value": answer}]
        records.append({"id": number, "image": f"{number}.png", "task": task, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def constructed(folder: Path, monkeypatch: pytest.MonkeyPatch, right: Answers, **changes: Any) -> tuple[Any, str]:
    """A search whose jobs answer as `right` says: its summary and its report. Half of the colours asked are red, three
    quarters of the images are not dark."""
    values = search_values(folder / "toy", **changes)
    train = write_split(folder / "train", ["red"] * 6 + ["green"] * 3 + ["blue"] * 3, ["no"] * 8 + ["yes"] * 4)
    values["stages"][0]["data"] = {"path": str(train)}
    for split, size in (("validation", 40), ("test", 20)):
        asked = write_split(folder / split, ["red", "green"] * (size // 2), ["no", "no", "no", "yes"] * (size // 4))
        values[split] = {"path": str(asked)}

    def run(job: Job) -> Result:
        if job.asked is None:
            return Result([], {}, "here")
        records = load_records(job.asked["path"])
        return Result([right(job, record) for record in records], {}, "here")

    monkeypatch.setattr(executors, "run_job", run)
    config = validate(SearchConfig, values, source="constructed")
    summary = search(config, folder / "out", console=QUIET)
    return summary, (folder / "out/report.md").read_text()


def answer(record: Record) -> str:
    return record.turns[-1].text


def sees_colours(job: Job, record: Record) -> bool:
    """Blind, always the majority's answer; clip names colours, sam half of them, nobody sees what is dark."""
    guess = answer(record) in ("red", "no")
    if job.kind == "blind" or record.task == "dark":
        return guess
    return "clip" in job.experts or guess


def test_baselines_and_floor_of_a_constructed_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary, report = constructed(tmp_path, monkeypatch, sees_colours, pool=["clip", "sam"])
    assert summary["best"]["experts"] == ["clip"]
    for split, images in (("validation", 40), ("test", 20)):
        known = summary["baselines"][split]
        colour, dark = known["tasks"]["colour"], known["tasks"]["dark"]
        assert colour["baselines"] == pytest.approx({"blind": 1 / 2, "majority": 1 / 2, "chance": 1 / 3})
        assert dark["baselines"] == pytest.approx({"blind": 3 / 4, "majority": 3 / 4, "chance": 1 / 2})
        assert (colour["majority_answer"], dark["majority_answer"]) == ("red", "no")
        assert (colour["answers"], dark["answers"], colour["images"]) == (3, 2, images)
        assert (colour["verdict"], dark["verdict"]) == ("above", "floor")
        assert colour["gain"]["mean"] == pytest.approx(1 / 2) and dark["gain"]["mean"] == 0
        assert known["value"] == pytest.approx({"blind": 5 / 8, "majority": 5 / 8, "chance": 5 / 12})
        assert known["over_blind"]["mean"] == pytest.approx(7 / 8 - 5 / 8)
        assert known["over_blind"]["carried_by"]["task"] == "colour"
    assert "Baselines on the test split: blind 0.625, majority 0.625, chance 0.417." in report
    low = "**At the floor on the test split**, not distinguishable from the best baseline or below it: dark (best"
    assert f"{low} baseline: blind 0.750)." in report
    assert "**One task, colour, carries the gain over blind** on the test split: 100% of it" in report
    assert "The best set is a single expert: there is no smaller one." in report
    assert "no smaller set" not in report.lower()
    kinds = Counter((row["kind"], row["seed"], len(row["right"])) for row in journal(tmp_path / "out"))
    assert kinds["blind", 0, 80] == kinds["blind", 1, 80] == kinds["blind", 0, 40] == kinds["blind", 1, 40] == 1


def test_every_figure_names_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, report = constructed(tmp_path, monkeypatch, sees_more_with_both(("colour", "dark")), proxy={"keep": 2})
    blocks = re.split(r"\n(?=## )", report)
    assert len(blocks) > 5
    for block in blocks[1:]:
        figures = re.search(r"\d\.\d{2}", block)
        title, header = block.split("\n")[0], next((row for row in block.split("\n") if row.startswith("| ")), "")
        named = "split" in title or ("validation" in header and "test" in header) or "on the validation split" in block
        assert named or not figures or title == "## How to read this", block
    for line in blocks[0].split("\n"):
        if re.search(r"[ +\-]\d\.\d{3}", line) and not line.startswith("Pool:"):  # which has weights of tasks
            assert "split" in line, line


def sees_more_with_both(tasks: tuple[str, ...]) -> Answers:
    """clip and sam together see these tasks, either alone answers as the majority."""

    def right(job: Job, record: Record) -> bool:
        both = len(job.experts) == 2 and job.kind != "blind"
        return answer(record) in ("red", "no") or (both and record.task in tasks)

    return right


def test_one_task_that_carries_a_gain_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, report = constructed(tmp_path / "one", monkeypatch, sees_more_with_both(("colour",)), pool=["clip", "sam"])
    (won,) = [c for c in one["rounds"][1]["candidates"] if c["experts"] == one["rounds"][1]["chosen"]]
    assert won["gain"]["mean"] == pytest.approx(1 / 4) and won["gain"]["carried_by"]["task"] == "colour"
    assert won["gain"]["carried_by"]["share"] == 1 and won["gain"]["carried_by"]["rest"]["mean"] == 0
    assert "**One task, colour, carries the gain of round 2** on the validation split: 100% of it" in report
    both = sees_more_with_both(("colour", "dark"))
    two, report = constructed(tmp_path / "two", monkeypatch, both, pool=["clip", "sam"])
    (won,) = [c for c in two["rounds"][1]["candidates"] if c["experts"] == two["rounds"][1]["chosen"]]
    assert won["gain"]["mean"] == pytest.approx(3 / 8) and won["gain"]["carried_by"] is None
    assert "carries" not in report.split("## How to read this")[0] and "At the floor" not in report
    assert "distinguishable from the best smaller set of each size" in report


def test_a_gain_is_carried_by_a_task_only_where_the_rest_is_nothing() -> None:
    """Shares by hand: 3 tasks of 40 images each."""
    tasks = [task for task in "abc" for _ in range(40)]
    metric = Metric(tasks, [str(row) for row in range(120)], {})

    def answers(a: int, b: int, c: int) -> torch.Tensor:
        return torch.tensor([[row < count for count in (a, b, c) for row in range(40)]]).float()

    def carrier(right: torch.Tensor, base: torch.Tensor, metric: Metric = metric) -> str | None:
        found = carried(metric, right, base, metric.gain(right, base))
        return found and found.task

    assert carrier(answers(30, 20, 10), answers(10, 20, 10)) == "a"
    assert carrier(answers(20, 20, 9), answers(10, 20, 10)) == "a"  # one is lost elsewhere
    assert carrier(answers(30, 40, 30), answers(10, 20, 10)) is None  # all gain alike
    assert carrier(answers(40, 30, 10), answers(10, 20, 10)) is None  # b gains too: 10 of 40
    assert carrier(answers(10, 20, 10), answers(30, 20, 10)) is None  # a loss
    alone = Metric(tasks, [str(row) for row in range(120)], {"b": 0, "c": 0})
    assert carrier(answers(30, 20, 10), answers(10, 20, 10), alone) is None  # there is nothing else
    small = Metric([task for task in "abcd" for _ in range(10)], [str(row) for row in range(40)], {})
    one_of_ten = torch.tensor([[row == 0 for _ in "abcd" for row in range(10)]]).float()
    gain, rest = small.gain(one_of_ten, torch.zeros(1, 40)), small.without("a")
    assert rest is not None and gain.distinguishable and not rest.gain(one_of_ten, torch.zeros(1, 40)).distinguishable
    assert carrier(one_of_ten, torch.zeros(1, 40), small) is None  # a quarter each: no task carries it
    more, base = answers(30, 20, 6), answers(10, 20, 10)
    found = carried(metric, more, base, metric.gain(more, base))
    assert found is not None and found.share == pytest.approx(20 / 16) and found.rest.mean == pytest.approx(-4 / 80)


def test_a_task_with_few_images_or_without_training_records_is_not_judged_by_them() -> None:
    def asked(number: int, task: str, text: str) -> Record:
        return Record(str(number), (Path(f"{number}.png"),), (Turn("user", "q"), Turn("assistant", text)), task)

    records = [asked(n, "few", "x") for n in range(5)] + [asked(5 + n, "new", "ab"[n % 2]) for n in range(8)]
    learnt = answer_counts([asked(0, "few", " x "), asked(1, "few", "y"), asked(2, "few", "x"), asked(3, "other", "a")])
    assert learnt == {"few": Counter(x=2, y=1), "other": Counter(a=1)}
    known = baselines_of(records, learnt, torch.zeros(2, 13))
    assert known.majority_answers == {"few": "x"} and known.answers == {"few": 2, "new": 2}
    metric = Metric([r.task for r in records], [str(r.images) for r in records], {})
    found = floors(metric, torch.ones(2, 13), known)
    assert found["few"].verdict == "too few images" and found["few"].baselines["majority"] == 1
    assert found["new"].verdict == "above" and set(found["new"].baselines) == {"blind", "chance"}
    assert found["new"].best == "chance" and found["new"].gain.mean == pytest.approx(1 / 2)
    worse = floors(metric, torch.zeros(2, 13), known)["new"]
    assert worse.verdict == "floor" and worse.gain.mean == pytest.approx(-1 / 2)


def test_experts_with_random_weights_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = search_values(tmp_path / "model")["model"]
    del values["experts"]["eva02"]["pretrained"]  # the variant's own weights
    stage = {"train": {"adapters": 1e-2, "experts.clip": 1e-3}, "max_steps": 2, "batch_size": 4}
    data = {"path": str(tmp_path / "train/data.json")}
    stages = [{"name": "together", "data": data, **stage}]
    summary, report = constructed(tmp_path, monkeypatch, sees_colours, model=values, stages=stages, seeds=1)
    assert summary["random_weights"] == {"clip": "trained", "sam": "frozen"}
    assert report.startswith("# Greedy search over 3 experts\n\n**clip (random)**: ")
    assert "**Random weights**: sam has random weights that no stage trains" in report
    assert "**Random weights**: clip has random weights at the start of the first stage." in report
    assert "Pool: clip (random), sam (random), eva02; " in report and "| eva02 |" in report
    for expert in ("clip", "sam"):
        assert not re.search(rf"\| \W*{expert} \|", report)
    config = validate(SearchConfig, search_values(tmp_path / "other"), source="toy")
    assert "over clip (random), sam (random), eva02 (random): at most" in planned_search(config)
    assert [note for note in notes(summary) if "sam" in note]


def test_what_is_said_of_smaller_sets() -> None:
    def said(best: list[str], tried: list[list[str]], equal: Any = None) -> str:
        sets = {" + ".join(names): {"experts": names} for names in tried}
        return smaller_set({"best": {"experts": best, "cheaper_equal": equal}, "sets": sets, "random_weights": {}})

    gain = {"mean": -0.1, "low": -0.2, "high": 0.05, "distinguishable": False}
    assert said(["a"], [["a"], ["b"]]) == "The best set is a single expert: there is no smaller one."
    assert said(["a", "b"], [["a", "b"]]) == "No smaller set was tried."
    assert "distinguishable from the best smaller set" in said(["a", "b"], [["a"], ["a", "b"]])
    equal = said(["a", "b"], [["a"], ["a", "b"]], {"experts": ["a"], "gain": gain})
    assert equal.startswith("**a**, which is smaller, is not distinguishable from it: the rest gains -0.100 [-0.2")
    assert equal.endswith("on the validation split.")
    better = {"experts": ["a"], "gain": {**gain, "high": -0.05, "distinguishable": True}}
    assert "**a**, which is smaller, is better" in said(["a", "b"], [["a"], ["a", "b"]], better)


def test_blind_answers_come_without_any_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey images of the same sizes, upright; the same question at the same size is asked once."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "b.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "turned.jpg", exif=turned)

    def record(name: str, question: str, text: str) -> Record:
        return Record(name, (tmp_path / name,), (Turn("user", question), Turn("assistant", text)), "t")

    records = [
        record("a.png", "colour", "red"), record("b.png", "colour", "blue"), record("b.png", "dark", "no"),
        record("turned.jpg", "colour", "red"),
    ]  # fmt: skip
    seen: list[tuple[Any, ...]] = []

    def answered(model: Any, processor: Any, asked: list[Record], *settings: Any) -> EvalReport:
        for one in asked:
            with Image.open(one.images[0]) as image:
                seen.append((image.size, image.getcolors(), one.turns[0].text))
        said = [Prediction(one.id, one.task, one.turns[-1].text, "red") for one in asked]
        return EvalReport({}, 0.0, len(said), said)

    monkeypatch.setattr(jobs, "evaluate", answered)
    job = Job("k", "blind", ("clip",), 0, {}, "f", 0)
    assert jobs.asked_blind(None, SimpleNamespace(), records, job) == [True, False, False, True]
    grey = [(600, (128, 128, 128))]
    assert seen == [((30, 20), grey, "colour"), ((30, 20), grey, "dark"), ((20, 30), grey, "colour")]
    assert grey_image((20, 30), tmp_path).name == "20x30.png"


def test_a_trained_model_is_asked_blind_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: what a kill left undone is asked at the next call, what was asked is not asked again; all questions
    of one kind have the same blind answer, whatever their images show."""
    values = search_values(tmp_path, pool=["clip"], seeds=1)
    config = validate(SearchConfig, values, source="toy")
    calls: list[Job] = []

    def counted(job: Job) -> Result:
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return jobs.run_job(job)

    monkeypatch.setattr(executors, "run_job", counted)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "out", console=QUIET)
    assert [job.kind for job in calls] == ["trial", "test", "blind", "blind"]
    summary = search(config, tmp_path / "out", console=QUIET)
    assert [job.key for job in calls[3:]] == [calls[3].key] * 2
    assert search(config, tmp_path / "out", console=QUIET) == summary and len(calls) == 5
    for row in journal(tmp_path / "out"):
        if row["kind"] == "blind":
            asked = json.loads(row["config"])["asked"]["path"]
            by_answer: dict[str, set[int]] = {}
            for record, right in zip(load_records(asked), row["right"], strict=True):
                if record.task == "colour":
                    by_answer.setdefault(answer(record), set()).add(right)
            assert all(len(found) == 1 for found in by_answer.values())
            assert sum(1 in found for found in by_answer.values()) <= 1
