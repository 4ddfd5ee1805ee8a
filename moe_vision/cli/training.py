"""Commands that train: train, compare, search."""

from pathlib import Path
from typing import Annotated

import typer

from moe_vision.cli.common import AsJson, Overrides, Overwrite, app, plugins_allowed, print_json
from moe_vision.cli.data import data_config, on_file, read_alike
from moe_vision.terminal import say, terminal


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A train config, in YAML.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; the same call resumes it.")] = Path(
        "run"
    ),
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL, in place of every stage's data.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths of --data start from.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder that keeps what frozen experts make of pictures, for other runs too.")
    ] = None,
    features_gb: Annotated[float, typer.Option(help="Gigabytes of --features at most.", min=0.0)] = 20.0,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A run that aligns an expert, as [bold]01-prealign-sam[/bold]; repeatable. Do no others."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a schedule, stage by stage. Run it again after a crash and it goes on where it stood."""
    from moe_vision.training.distributed import finish, main_console
    from moe_vision.training.loading import load_train_config
    from moe_vision.training.runner import train as run

    train_config = load_train_config(config, overrides or [], allow_plugins=plugins_allowed(context))
    if data is not None:
        train_config = on_file(train_config, data_config(data, image_root))
    cache = None
    if features is not None:
        from moe_vision.training.feature_store import FeatureStore

        cache = FeatureStore(features, features_gb)
    folder = run(train_config, output, overwrite=overwrite, console=terminal(), cache=cache, only=only or [])
    said = f"model: {folder}" if folder != output else f"output: {folder}"
    say(main_console(terminal()), said, soft_wrap=True)
    finish()


@app.command()
def compare(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A train config with `mixers` and `test`, in YAML.")],
    overrides: Overrides = None,
    mixer: Annotated[
        str | None, typer.Option(help="Names, as channel_concat,deformable; all of the config's if left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many, from the config's seed on.", min=1)] = 3,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the comparison; the same call resumes it.")
    ] = Path("comparison"),
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL, in place of every stage's data.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="LLaVA-format JSON or JSONL that is asked afterwards.")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that image paths of --data and --test start from.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train each mixer for the same budget, and print accuracy, tokens, parameters, FLOPs and speed in one table."""
    from moe_vision.comparison import CompareConfig
    from moe_vision.comparison import compare as run
    from moe_vision.training.loading import load_schedule
    from moe_vision.viz.tables import comparison_table

    compared = load_schedule(CompareConfig, config, overrides or [], allow_plugins=plugins_allowed(context))
    if data is not None:
        compared = on_file(compared, data_config(data, image_root))
    if test is not None:
        compared = compared.model_copy(update={"test": read_alike(compared.test, data_config(test, image_root))})
    names = [*compared.mixers] if mixer is None else [name.strip() for name in mixer.split(",")]
    summary = run(compared, names, seeds, output, overwrite=overwrite, console=terminal(stderr=as_json))
    if as_json:
        print_json(summary)
    else:
        terminal().print(comparison_table(summary))
        print(f"report: {output / 'report.md'}")


@app.command()
def search(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A search config, in YAML.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the search; the same call resumes it.")] = (
        Path("search")
    ),
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL, in place of every stage's data.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="LLaVA-format JSON or JSONL that sets are chosen by.")] = None,
    test: Annotated[Path | None, typer.Option(help="LLaVA-format JSON or JSONL that the chosen set is asked.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths of these files start from.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what has failed before.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find the experts that help most, one round at a time, with a report that says what can be told from chance."""
    from moe_vision.search import SearchConfig
    from moe_vision.search import search as run
    from moe_vision.search.notes import notes
    from moe_vision.training.loading import load_schedule
    from moe_vision.viz.tables import marked

    searched = load_schedule(SearchConfig, config, overrides or [], allow_plugins=plugins_allowed(context))
    if data is not None:
        searched = on_file(searched, data_config(data, image_root))
    asked = {name: path for name, path in (("validation", validation), ("test", test)) if path is not None}
    named = {name: read_alike(getattr(searched, name), data_config(path, image_root)) for name, path in asked.items()}
    searched = searched.model_copy(update=named)
    summary = run(searched, output, overwrite=overwrite, retry_failed=retry_failed, console=terminal(stderr=as_json))
    if as_json:
        print_json(summary)
    else:
        best = summary["best"]
        name = marked(best["experts"], summary["random_weights"])
        print(f"best: {name}, {best['test']['value']['mean']:.3f} of the test split")
        for note in notes(summary):
            print(f"- {note.replace('**', '')}")
        print(f"report: {output / 'report.md'}; train it: moe-vision train {output / 'best.yaml'} --output run")
