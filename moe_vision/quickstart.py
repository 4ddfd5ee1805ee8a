"""The whole path on the embedded miniature, in one folder: pictures, training, scores, answers, export, report."""

import json
import shutil
import time
from importlib import resources
from pathlib import Path

from rich.console import Console

from moe_vision.config import apply_override, read_yaml
from moe_vision.data.records import load_records
from moe_vision.data.synthetic import write_split
from moe_vision.evaluation import EvalReport, answer, evaluate, load_on_accelerator
from moe_vision.export import ExportReport, export
from moe_vision.files import read_json, write_text, writing
from moe_vision.terminal import headline, say
from moe_vision.training.output import OutputError
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from moe_vision.viz.tables import accuracy_table

TRAIN_SCENES, TEST_SCENES = 2000, 200
MARK = "quickstart.json"


def micro_config(seed: int, data: dict[str, Path], experts: list[str] | None = None) -> TrainConfig:
    """The micro train config on generated data; `experts` keeps only those."""
    path = Path(str(resources.files("moe_vision"))) / "configs" / "train" / "micro.yaml"
    values = read_yaml(path, TrainConfig)
    values["seed"] = seed
    for stage, name in zip(values["stages"], ("captions", "questions"), strict=True):
        stage["data"] = {"path": str(data[name].resolve())}
    if experts is not None:
        model = read_yaml(Path(values["model"]))
        for name in [name for name in model["experts"] if name not in experts]:
            model = apply_override(model, f"experts.{name}=null")
        values["model"] = model
    return TrainConfig.model_validate(values)


def quickstart(output: Path, *, seed: int, overwrite: bool, console: Console) -> None:
    """Write `output`/{data, run, run-clip, export, report.md}. Raises OutputError if it holds something else."""
    started = time.perf_counter()
    prepare(output, seed, overwrite)
    headline(console, "1. pictures")
    with writing("images", output / "data"):
        data = write_split(output / "data", "train", TRAIN_SCENES, seed)
        test_file = write_split(output / "data", "test", TEST_SCENES, seed)["questions"]
    say(console, f"{TRAIN_SCENES} + {TEST_SCENES} pictures and LLaVA-format JSON in {output / 'data'}")
    test = load_records(test_file)
    scores: dict[str, EvalReport] = {}
    for number, (title, folder, experts) in enumerate(
        (("CLIP alone", "run-clip", ["clip"]), ("all five", "run", None)), start=2
    ):
        headline(console, f"{number}. train {title}")
        trained = train(micro_config(seed, data, experts), output / folder, console=console)
        scores[title] = evaluate(*load_on_accelerator(trained), test)
        say(console, f"{title}: {scores[title].average:.3f} of the test questions right")
    headline(console, "4. scores on the test split")
    console.print(accuracy_table({title: report.by_task for title, report in scores.items()}))
    headline(console, "5. three questions about one picture")
    model, processor = load_on_accelerator(output / "run" / "model")
    asked = [record for record in test if record.images == test[0].images][:3]
    dialogue = []
    for record in asked:
        question = record.turns[0].text.removeprefix("<image>\n")
        dialogue.append((question, answer(model, processor, question, record.images), record.turns[1].text))
        say(console, f"{question}? {dialogue[-1][1]} (right: {dialogue[-1][2]})")
    headline(console, "6. export")
    exported = export(output / "run", output / "export", metrics=scores["all five"].by_task, overwrite=True)
    say(console, exported.summary())
    seconds = time.perf_counter() - started
    report = write_report(output, seed, scores, asked[0].images[0], dialogue, exported, seconds)
    headline(console, "next")
    say(
        console,
        f"report: {report} ({seconds:.0f} s in all). Now try:\n"
        f'  moe-vision generate {output / "run"} "{asked[0].turns[0].text[8:]}" --image {asked[0].images[0]}\n'
        "  moe-vision show configs/model/eagle-x5.yaml\n"
        f"  moe-vision train configs/train/micro.yaml --data {data['questions']} --output my-run",
        soft_wrap=True,
    )  # fmt: skip


def prepare(output: Path, seed: int, overwrite: bool) -> None:
    """Make the folder, or reopen one of the same seed. Raises OutputError."""
    mark = output / MARK
    if output.exists() and overwrite and mark.is_file():
        shutil.rmtree(output)
    if output.exists() and (output.is_file() or any(output.iterdir())) and not mark.is_file():
        raise OutputError(f"output '{output}' exists and is no quickstart folder: choose another --output")
    if mark.is_file() and read_json(mark, "quickstart's mark").get("seed") != seed:
        raise OutputError(f"output '{output}' was made with another seed: choose another --output, or --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(mark, json.dumps({"seed": seed}), "quickstart's mark")
    except OSError as error:
        raise OutputError(f"output '{output}' cannot be written ({error}): choose another --output") from error


def write_report(
    output: Path, seed: int, scores: dict[str, EvalReport], picture: Path, dialogue: list[tuple[str, str, str]],
    exported: ExportReport, seconds: float,
) -> Path:  # fmt: skip
    """report.md: scores, answers, export."""
    titles = list(scores)
    lines = [
        "# Quickstart report", "",
        f"Seed {seed}, {TRAIN_SCENES} training pictures, {TEST_SCENES} test pictures, {seconds:.0f} s in all.", "",
        f"| task | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}",
    ]  # fmt: skip
    for task in scores[titles[0]].by_task:
        lines.append(f"| {task} | {' | '.join(f'{scores[title].by_task[task]:.3f}' for title in titles)} |")
    lines.append(f"| **average** | {' | '.join(f'**{scores[title].average:.3f}**' for title in titles)} |")
    lines += ["", f"## Asked about {picture.relative_to(output)}", "", f"![picture]({picture.relative_to(output)})", ""]
    lines += [f"- {question}? **{given}** (right: {right})" for question, given, right in dialogue]
    lines += ["", "## Export", "", exported.summary(), ""]
    path = output / "report.md"
    write_text(path, "\n".join(lines), "report")
    return path
