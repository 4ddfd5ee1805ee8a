"""A stage's data as a file: the user's own, or scenes that are drawn once, as a user's file would be."""

import shutil
from pathlib import Path

from moe_vision.data.records import Record, load_records
from moe_vision.data.synthetic import write_split
from moe_vision.training.schedule import DataConfig


def on_disk(data: DataConfig, folder: Path, seed: int) -> DataConfig:
    """The same data with a `path`; scenes are drawn below `folder`, whole or not at all, unless they are there."""
    if data.synthetic is None:
        return data
    assert data.scenes is not None  # DataConfig refused it
    target = folder / f"{data.split}-{data.scenes}"
    if not target.is_dir():
        partial = folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_split(partial, data.split, data.scenes, seed)
        partial.replace(target)
    return DataConfig(path=str((target / f"{data.split}_{data.synthetic}.json").resolve()))


def records_of(data: DataConfig, folder: Path, seed: int) -> list[Record]:
    """Records of data, `on_disk` or brought there. Raises DataError."""
    found = on_disk(data, folder, seed)
    assert found.path is not None
    return load_records(found.path, found.image_root)
