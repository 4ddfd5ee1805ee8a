"""Commands about the miniature that ships with the package."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_vision.cli.common import AsJson, Overwrite, app, micro_app, print_json
from moe_vision.terminal import terminal


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of pictures and training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Run the whole path on the embedded miniature: pictures, training, evaluation, questions, export, report."""
    from moe_vision.quickstart import quickstart as run

    run(output, seed=seed, overwrite=overwrite, console=terminal())


@micro_app.command("rebuild")
def rebuild(
    expert: Annotated[list[str] | None, typer.Option(help="Only this part; give it again for more.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; the package's own by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every recipe.")] = 0,
) -> None:
    """Train the miniature experts and language model from nothing, as they were made for this package."""
    from moe_vision.recipes.rebuild import rebuild as run

    print_json(run(expert, output, seed=seed))


@micro_app.command("list")
def list_micro(as_json: AsJson = False) -> None:
    """Print what ships: files, parameters, the seed and metrics of their recipes."""
    from moe_vision.experts.weights import packaged
    from moe_vision.viz.tables import micro_table

    manifest = json.loads((packaged("micro") / "manifest.json").read_text(encoding="utf-8"))
    if as_json:
        print_json(manifest)
    else:
        terminal().print(micro_table(manifest))
