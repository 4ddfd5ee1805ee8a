"""The Typer applications, options of every command, and types of options that several commands share."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_vision.files import resolved
from moe_vision.terminal import encodable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mixtures of vision experts in multimodal language models.\n\n"
    "Start with [bold]moe-vision quickstart[/bold], then [bold]show[/bold] a config, [bold]train[/bold] it, "
    "[bold]eval[/bold]uate it, [bold]generate[/bold] answers, [bold]export[/bold] it.",
)
micro_app = typer.Typer(
    no_args_is_help=True, help="The miniature experts and language model that ship with the package."
)
app.add_typer(micro_app, name="micro")
import_app = typer.Typer(no_args_is_help=True, help="Bring in checkpoints that other projects published.")
app.add_typer(import_app, name="import")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE ...", help="Overrides, as [bold]experts.clip.layer=-2[/bold]; "
                   "[bold]experts.sam=null[/bold] takes an expert out; of the model that a config of "
                   "training, comparison or search names, [bold]model.experts.sam=null[/bold]."),
]  # fmt: skip
ImportOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write; by default SOURCE's name and -moe-vision, here.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def print_json(value: Any) -> None:
    """Print JSON that standard output can hold: with escapes where its encoding lacks a character."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text if encodable(text) else json.dumps(value, indent=2))


def plugins_allowed(context: typer.Context) -> bool:
    """Whether `--allow-plugins` was given."""
    return bool(context.find_root().params.get("allow_plugins"))


def print_version(wanted: bool) -> None:
    """Print the version, and end the command, if it is wanted."""
    if wanted:
        from moe_vision import __version__

        print(__version__)
        raise typer.Exit


def run_plugins_of(context: typer.Context, model: Path) -> None:
    """Run the plug-ins that a run's resolved config names, unless `--plugin` gave files in their place.

    model: a run's output, or the model folder in it. Raises ConfigError where one is missing, or needs consent.
    """
    run = model if (model / "config.yaml").exists() else model.parent
    if context.find_root().params.get("plugin") or model_of(model) is None or not (run / "config.yaml").exists():
        return
    from moe_vision.config import read_yaml
    from moe_vision.plugins import checked_plugin, import_plugin

    values = read_yaml(run / "config.yaml").get("model")
    named = values.get("plugins") if isinstance(values, dict) else None
    for name in named if isinstance(named, list) else ():
        path = checked_plugin(str(name), run, plugins_allowed(context), str(run / "config.yaml"), "model.plugins")
        import_plugin(Path(path), str(run / "config.yaml"))


def model_of(path: Path) -> Path | None:
    """The model folder that training wrote at a path or in it; None where there is none."""
    if (path / "model" / "config.json").is_file():
        return path / "model"
    return path if resolved(path).name == "model" and (path / "config.json").is_file() else None


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=print_version, is_eager=True)
    ] = False,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Import this file first: it registers what a model folder was made with.")
    ] = None,
    allow_plugins: Annotated[
        bool, typer.Option("--allow-plugins", help="Run plug-ins of configs that are outside the config's folder too.")
    ] = False,
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for path in plugin or []:
        from moe_vision.config import import_plugin

        import_plugin(path, "--plugin")
