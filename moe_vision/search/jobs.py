"""What a process does for a search, from plain values to plain values: align an expert, train and ask a set of experts,
ask a finished model."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock
from PIL import Image
from rich.console import Console

from moe_vision.data.records import Record, image_size
from moe_vision.evaluation import evaluate, load_on_accelerator
from moe_vision.modeling.model_config import packaged_config
from moe_vision.training.data import records_of
from moe_vision.training.feature_store import FeatureStore
from moe_vision.training.features import KnownPictures, known_maps, pictures_of
from moe_vision.training.prealign import aligned_file
from moe_vision.training.runner import train
from moe_vision.training.schedule import DataConfig, TrainConfig

Kind = Literal["align", "trial", "test", "blind"]
"""test and blind ask a trained model: on its images, or on grey ones in their place."""


@dataclass(frozen=True)
class Job:
    """One piece of work. key: the hash of all that decides its result. schedule: a train config, its data on disk.
    folder: of its training. asked: the data that the trained model is asked, on disk; data_seed: that mixes it.
    features: folder and gigabytes of the store, if there is one. processes: that train together.
    """

    key: str
    kind: Kind
    experts: tuple[str, ...]
    seed: int
    schedule: dict[str, Any]
    folder: str
    data_seed: int
    asked: dict[str, Any] | None = None
    max_new_tokens: int = 16
    eval_batch_size: int = 64
    features: tuple[str, float] | None = None
    processes: int = 1

    @property
    def what(self) -> str:
        return {"align": "align", "trial": "train", "test": "test", "blind": "ask without images"}[self.kind]


@dataclass(frozen=True)
class Result:
    """right: of each item that was asked, whether it was answered right. seconds: of training and asking."""

    right: list[bool]
    seconds: dict[str, float]
    host: str


def run_job(job: Job) -> Result:
    """Do it, or what is left of it after a kill. Nobody else works in its folder meanwhile: what a killed driver has
    left running ends first."""
    folder = Path(job.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        started = time.perf_counter()
        schedule = TrainConfig.model_validate(job.schedule)
        if job.kind != "align" or not aligned_file(folder, job.experts[0]).is_file():
            trained(schedule, folder, job)
        seconds = {"train": time.perf_counter() - started}
        started = time.perf_counter()
        right = [] if job.asked is None else asked(schedule, folder, job)
        seconds["ask"] = time.perf_counter() - started
    return Result(right, seconds, socket.gethostname())


def trained(schedule: TrainConfig, folder: Path, job: Job) -> None:
    """Train, in this process or by a launch of several. Raises RuntimeError with the fault in a launch's output."""
    if job.processes == 1:
        train(schedule, folder, console=Console(quiet=True), cache=store_of(job))
        return
    config = folder.with_name(f"{folder.name}.yaml")
    config.write_text(yaml.safe_dump(schedule.model_dump(mode="json")), encoding="utf-8")
    ways = packaged_config("accelerate/ddp.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ways)]
    command += ["--num_processes", str(job.processes), "--main_process_port", "0"]
    # What the plug-ins of this config may do was decided when it was read.
    command += ["-m", "moe_vision", "--allow-plugins", "train", str(config), "--output", str(folder)]
    if job.features is not None:
        command += ["--features", job.features[0], "--features-gb", str(job.features[1])]
    log = folder.with_name(f"{folder.name}.launch.log")
    with log.open("a", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the launch holds it too, and a killed worker's launch lives on
        held.truncate(0)
        ended = subprocess.run(command, stdout=held, stderr=subprocess.STDOUT, check=False)
    if ended.returncode != 0:
        output = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the launch ended with {ended.returncode}: {fault_of(output)}; all it said is in '{log}'\n"
                           f"{output[-2000:]}")  # fmt: skip


def fault_of(output: str) -> str:
    """The first line of a launch's output that names an error, else its last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*Error|error)\b.*: ", line)]
    return (named or lines[-1:])[0]


def asked(schedule: TrainConfig, folder: Path, job: Job) -> list[bool]:
    """Whether the trained model answers each item right."""
    assert job.asked is not None
    records = records_of(DataConfig.model_validate(job.asked), folder, job.data_seed)
    model, processor = load_on_accelerator(folder / "model")
    if job.kind == "blind":
        return asked_blind(model, processor, records, job)
    known = known_pictures(model, processor, schedule, records, store_of(job))
    report = evaluate(model, processor, records, job.eval_batch_size, job.max_new_tokens, known)
    return [prediction.right for prediction in report.predictions]


def asked_blind(model: Any, processor: Any, records: list[Record], job: Job) -> list[bool]:
    """Whether the model answers each item right with a grey image of the same size in the place of each of its images.
    Items whose question and sizes are the same get the same answer, made once."""
    with tempfile.TemporaryDirectory() as folder:
        greys = {path: grey_image(image_size(path), Path(folder)) for path in pictures_of(records)}
        blinded = [replace(record, images=tuple(greys[path] for path in record.images)) for record in records]
        distinct = list({(record.images, record.turns[:-1]): record for record in blinded}.values())
        report = evaluate(model, processor, distinct, job.eval_batch_size, job.max_new_tokens)
    said = {
        (record.images, record.turns[:-1]): prediction
        for record, prediction in zip(distinct, report.predictions, strict=True)
    }
    return [replace(said[record.images, record.turns[:-1]], answer=record.turns[-1].text).right for record in blinded]


def grey_image(size: tuple[int, int], folder: Path) -> Path:
    """A file with an image of (height, width) pixels, all of the same grey."""
    height, width = size
    path = folder / f"{height}x{width}.png"
    if not path.is_file():
        Image.new("RGB", (width, height), (128, 128, 128)).save(path)
    return path


def known_pictures(
    model: Any, processor: Any, schedule: TrainConfig, records: list[Record], store: FeatureStore | None
) -> KnownPictures | None:
    """What stands for the pictures of an evaluation: maps of the experts that no stage trains."""
    if store is None or not model.model.policy.one_view:
        return None
    rates = {group: rate for stage in schedule.stages for group, rate in stage.rates.items()}
    stage = schedule.stages[-1].model_copy(update={"precision": "fp32"})
    return known_maps(model, processor, pictures_of(records), stage, rates, store)


def store_of(job: Job) -> FeatureStore | None:
    return None if job.features is None else FeatureStore(Path(job.features[0]), job.features[1])


def end_with(parent: int) -> None:
    """End this process soon after its parent has: a killed driver leaves nobody at work behind it."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
