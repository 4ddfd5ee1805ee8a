"""Commands that import checkpoints of other projects."""

from pathlib import Path
from typing import Annotated

import typer

from moe_vision.cli.common import ImportOutput, Overrides, import_app
from moe_vision.files import resolved

AllowBin = Annotated[
    bool, typer.Option("--allow-bin", help="Read pickled weights (.bin) where the folder has no .safetensors.")
]


def imported_name(source: Path) -> Path:
    """Where an import goes that was not told where."""
    return Path(f"{resolved(source).name}-moe-vision")


def say_imported(folder: Path) -> None:
    """Print where an import is, and what to try."""
    print(f'imported to {folder}. Now try: moe-vision generate {folder} "what is this" --image PICTURE')


@import_app.command("eagle")
def import_eagle(
    source: Annotated[Path, typer.Argument(help="Folder of an Eagle-X4 or X5 checkpoint.")],
    output: ImportOutput = None,
    overrides: Overrides = None,
    allow_bin: AllowBin = False,
) -> None:
    """Turn an Eagle checkpoint (NVlabs/Eagle, `eagle_llama`) into a model folder for generate, eval and export."""
    from moe_vision.interop import import_eagle as run

    folder = run(source, output or imported_name(source), overrides or [], allow_bin)
    say_imported(folder)


@import_app.command("llava-uhd")
def import_llava_uhd(
    source: Annotated[Path, typer.Argument(help="Folder of a LLaVA-UHD v1 checkpoint.")],
    output: ImportOutput = None,
    overrides: Overrides = None,
    allow_bin: AllowBin = False,
) -> None:
    """Turn a LLaVA-UHD v1 checkpoint (thunlp/LLaVA-UHD) into a model folder for generate, eval and export."""
    from moe_vision.interop import import_llava_uhd as run

    folder = run(source, output or imported_name(source), overrides or [], allow_bin)
    say_imported(folder)


@import_app.command("slime")
def import_slime(
    source: Annotated[Path, typer.Argument(help="Folder of a SliME checkpoint.")],
    output: ImportOutput = None,
    overrides: Overrides = None,
    allow_bin: AllowBin = False,
) -> None:
    """Turn a SliME checkpoint (yfzhang114/SliME) into a model folder for generate, eval and export."""
    from moe_vision.interop import import_slime as run

    folder = run(source, output or imported_name(source), overrides or [], allow_bin)
    say_imported(folder)
