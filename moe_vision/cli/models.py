"""Commands about trained models: eval, generate, export, verify."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_vision.cli.common import AsJson, Overwrite, app, print_json, run_plugins_of
from moe_vision.files import check_not_input, json_text, read_json, write_text
from moe_vision.terminal import say, terminal


class FaultChoice(StrEnum):
    """As `on_fault` of a data source."""

    fatal = "fatal"
    skip = "skip"


@app.command("eval")
def evaluate_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A run's output, its model/ folder, or an export.")],
    data: Annotated[Path, typer.Argument(help="LLaVA-format JSON or JSONL; `task` groups the scores.")],
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 16,
    predictions: Annotated[Path | None, typer.Option(help="Write every answer to this JSON file.")] = None,
    on_fault: Annotated[
        FaultChoice,
        typer.Option(help="What a faulty record does: end the evaluation before it begins, or be left out."),
    ] = FaultChoice.fatal,
    as_json: AsJson = False,
) -> None:
    """Answer every question of a file and print the share of exact matches, per task."""
    from moe_vision.data.faults import DataError, Fault, SourceReport, problems_of
    from moe_vision.data.records import load_records, read_records
    from moe_vision.evaluation import evaluate, load_on_accelerator
    from moe_vision.viz.tables import accuracy_table

    if predictions is not None:
        check_not_input(predictions, [data], "the file of predictions")
    run_plugins_of(context, model)
    faults: list[Fault] = []
    if on_fault is FaultChoice.skip:
        records, faults = read_records(data, image_root or data.parent, verify=True)
        if not records:
            raise DataError(data, problems_of(faults))
    else:
        records = load_records(data, image_root)
    report = evaluate(*load_on_accelerator(model), records, batch_size, max_new_tokens, on_fault=on_fault.value)
    report = replace(report, skipped=(*faults, *report.skipped))
    if predictions is not None:
        write_text(predictions, json_text(report.to_dict()), "predictions")
    if report.skipped:
        whole = SourceReport(str(data), report.count + len(report.skipped), report.count, report.count, report.skipped)
        reasons = ", ".join(f"{reason} {count}" for reason, count in whole.counts.items())
        note(f"{len(report.skipped)} of {whole.read} records are left out: {reasons}; --predictions lists them")
    for warning in report.warnings():
        note(f"warning: {warning}")
    if as_json:
        skipped = {"skipped": len(report.skipped)} if report.skipped else {}
        print_json({"average": report.average, "by_task": report.by_task, "count": report.count, **skipped})
    else:
        terminal().print(accuracy_table({model.name: report.by_task}))


def note(text: str) -> None:
    """Print a line for people to standard error, so that standard output holds results only."""
    say(terminal(stderr=True), text, soft_wrap=True)


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A run's output, its model/ folder, or an export.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture; give it again for more.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    as_json: AsJson = False,
) -> None:
    """Ask one question about pictures on disk."""
    from moe_vision.data.records import load_image
    from moe_vision.evaluation import answer, load_on_accelerator

    images = image or []
    run_plugins_of(context, model)
    for path in images:
        load_image(path)
    text = answer(*load_on_accelerator(model), question, images, max_new_tokens)
    if not text:
        note(
            "warning: the answer is empty: the model generates its end token first. Check that training lowered the "
            "loss, on answers that are not empty, with this chat template"
        )
    if as_json:
        print_json({"question": question, "images": [str(path) for path in images], "answer": text})
    else:
        print(text)


@app.command()
def export(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A run's output or its model/ folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the saved one by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    metrics: Annotated[
        Path | None, typer.Option(help="JSON of results for the card, as `eval --json` prints it.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="NAME/MODEL", help="Upload the folder to this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, if it is new.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face folder that loads without this package, and prove it in a second process."""
    from moe_vision.export import export as run

    run_plugins_of(context, source)
    results = None if metrics is None else read_json(metrics, "metrics")
    report = run(
        source, output, dtype=dtype, max_shard_size=max_shard_size, metrics=results, push=push, private=private,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        print(report.summary())


@app.command()
def verify(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="An export, or a run's output or its model/ folder.")],
    as_json: AsJson = False,
) -> None:
    """Prove that a folder is whole and loads without this package, as `export` does."""
    from moe_vision.export import verify as run

    run_plugins_of(context, folder)
    result = run(folder)
    if as_json:
        print_json(result)
    else:
        print(f"'{folder}' loads without moe_vision; logits within {result['max_difference']:.3g} of its own here, "
              f"{result['new_tokens']} tokens generated")  # fmt: skip
