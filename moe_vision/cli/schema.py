"""The command `schema`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_vision.cli.common import app
from moe_vision.files import write_text


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="model, train, compare or search")] = "model",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of printing.")] = None,
) -> None:
    """Print the JSON Schema that editors complete and check config files with."""
    from moe_vision.comparison import CompareConfig
    from moe_vision.config import Config
    from moe_vision.modeling.model_config import ModelConfig
    from moe_vision.registry import suggest
    from moe_vision.search import SearchConfig
    from moe_vision.training.schedule import TrainConfig

    kinds: dict[str, type[Config]] = {"model": ModelConfig, "train": TrainConfig, "compare": CompareConfig,
                                     "search": SearchConfig}  # fmt: skip
    if kind not in kinds:
        raise ValueError(f"schema of '{kind}': {suggest(kind, list(kinds))}")
    text = json.dumps(kinds[kind].model_json_schema(), indent=2)
    if output is None:
        print(text)
    else:
        write_text(output, text + "\n", "schema")
