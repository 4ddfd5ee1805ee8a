"""A search over three miniature experts with random weights, small enough that a trial takes a second."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_vision.config import validate
from moe_vision.search import SearchConfig
from tests.unit.toy import model_values, write_data

EXPERTS = ("clip", "sam", "eva02")
QUIET = Console(quiet=True)


def write_asked(folder: Path, count: int) -> Path:
    """One question about each picture: its colour in one half, whether it is black in the other."""
    path = write_data(folder, count)
    records = json.loads(path.read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        turns = record["conversations"]
        record["conversations"] = turns[:2] if number % 2 else [turns[2], turns[3]]
        record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"].removeprefix(
            "<image>\n"
        )
        record["task"] = "colour" if number % 2 else "dark"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def search_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a search config; data below `folder`."""
    stage = {"train": {"adapters": 1e-2, "language_model": 1e-2}, "max_steps": 12, "batch_size": 4}
    experts = {name: {"variant": "micro", "pretrained": None} for name in EXPERTS}
    return {
        "model": model_values(folder, **experts),
        "stages": [{"name": "together", "data": {"path": str(write_data(folder / "train", 12))}, **stage}],
        "validation": {"path": str(write_asked(folder / "validation", 16))},
        "test": {"path": str(write_asked(folder / "test", 12))},
        "seeds": 2, "max_new_tokens": 3, **changes,
    }  # fmt: skip


def search_config(folder: Path, **changes: Any) -> SearchConfig:
    return validate(SearchConfig, search_values(folder, **changes), source="toy search")


def journal(output: Path) -> list[dict[str, Any]]:
    connection = sqlite3.connect(output / "search.db")
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute("SELECT * FROM jobs ORDER BY started")]
    connection.close()
    return rows


def reported(output: Path) -> dict[str, bytes]:
    """What a search says, by file."""
    files = ["report.md", "results.json", "best.yaml", *(f"pictures/{p.name}" for p in output.glob("pictures/*"))]
    return {name: (output / name).read_bytes() for name in files}
