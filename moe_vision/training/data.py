"""A stage's data as files: the user's own, or scenes that are drawn and tables that are written once, as a user's files
would be."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from moe_vision.data.config import DataConfig, SourceConfig
from moe_vision.data.records import Record
from moe_vision.data.samples import Samples, Source, mix, read_source
from moe_vision.data.synthetic import write_split
from moe_vision.data.tables import write_table
from moe_vision.modeling import MoeVisionProcessor

STAGING = ".data.partial"
"""Where an output's data lies until all else is in order."""

SOURCE_KEYS = ("image_root", "synthetic", "scenes", "split", "dataset", "config", "columns", "streaming")
"""What says where data comes from, and nothing more once it lies at a path."""

SourceT = TypeVar("SourceT", bound=SourceConfig)


def on_disk(data: DataConfig, folder: Path, seed: int) -> DataConfig:
    """The same data with a `path` for each source; scenes are drawn and tables written below `folder`, whole or not at
    all, unless they are there. Raises DataError where a table cannot be read."""
    if data.mixture is None:
        return source_on_disk(data, folder, seed)
    return data.model_copy(update={"mixture": [source_on_disk(part, folder, seed) for part in data.mixture]})


def source_on_disk(data: SourceT, folder: Path, seed: int) -> SourceT:
    """One source as `on_disk` has it, with its own settings."""
    if data.path is not None:
        return data
    path = write_table(data, folder) if data.dataset is not None else drawn(data, folder, seed)
    unset = {key: SourceConfig.model_fields[key].default for key in SOURCE_KEYS}
    return data.model_copy(update={**unset, "path": str(path.resolve())})


def drawn(data: SourceConfig, folder: Path, seed: int) -> Path:
    """The file of drawn scenes."""
    assert data.scenes is not None  # SourceConfig refused it
    target = folder / f"{data.split}-{data.scenes}"
    if not target.is_dir():
        partial = folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_split(partial, data.split, data.scenes, seed)
        partial.replace(target)
    return target / f"{data.split}_{data.synthetic}.json"


def read_data(data: DataConfig, folder: Path, seed: int, workers: int = 1) -> list[Source]:
    """Every source of data, `on_disk` or brought there, checked as `read_source` does. Raises DataError."""
    return [read_source(source_on_disk(part, folder, seed), part.title, max(1, workers)) for part in data.parts]


def read_stages(stages: Mapping[str, tuple[DataConfig, int]], folder: Path, seed: int) -> dict[str, list[Source]]:
    """Sources of each stage by its name, from its data and number of workers; stages of the same data share them."""
    read: dict[str, list[Source]] = {}
    for data, workers in stages.values():
        key = data.model_dump_json()
        if key not in read:
            read[key] = read_data(data, folder, seed, workers)
    return {name: read[data.model_dump_json()] for name, (data, _) in stages.items()}


def records_in(sources: Sequence[Source]) -> list[Record]:
    """Every record of sources once, in their order."""
    return [record for source in sources for record in source.records]


def records_of(data: DataConfig, folder: Path, seed: int) -> list[Record]:
    """Records of data, mixed, `on_disk` or brought there. Raises DataError."""
    sources = read_data(data, folder, seed)
    return [record for own in mix(sources, [source.records for source in sources], seed) for record in own]


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Where the data of a checked output belongs: `data/` of a run that goes on, else a folder that `settle` makes that
    of. If it never does, nothing is left of it: whatever fails before has changed nothing."""
    output, new = output.resolve(), not output.exists()
    shutil.rmtree(output / STAGING, ignore_errors=True)  # of a run that was killed before it began
    if (output / "config.yaml").is_file() and not overwrite:
        yield output / "data"
        return
    try:
        yield output / STAGING
    finally:
        shutil.rmtree(output / STAGING, ignore_errors=True)
        if new and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def settle(folder: Path, output: Path) -> Path:
    """Make a `staged` folder the data of its opened output; returns where it lies then."""
    target = output.resolve() / "data"
    if folder != target and folder.is_dir():
        folder.replace(target)
    return target


def report_of(samples: Mapping[str, Samples]) -> str:
    """data_report.json: by run, what became of each source, and every record that was skipped."""
    return json.dumps({name: [report.to_dict() for report in own.reports] for name, own in samples.items()}, indent=1)


def skipped_lines(samples: Mapping[str, Samples], path: Path) -> Sequence[str]:
    """What the console says of sources with skipped records, each once."""
    reports = [report for own in samples.values() for report in own.reports if report.skipped]
    return [f"{report}; listed in {path}" for report in dict.fromkeys(reports)]


def unknown_lines(samples: Mapping[str, Samples], processor: MoeVisionProcessor) -> Sequence[str]:
    """What the console says of records whose text the tokenizer does not know, each once: it reads all of that as one
    token, so that no answer with it can be learnt."""
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return []
    found = []
    for own in samples.values():
        held = [sample.record.id for sample in own.items if unknown in sample.text.input_ids]
        if held:
            found.append(
                f"warning: {len(held)} of {len(own.items)} records hold text that the tokenizer does not know and "
                f"reads as '{tokenizer.unk_token}', as record {held[0]!r}: write it in other words, or take a language "
                "model that knows it"
            )
    return list(dict.fromkeys(found))
