"""What is tried: for each area a function that makes, from a seeded generator, an input and what must hold of it."""

import atexit
import functools
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageOps

from moe_vision.config import load_config
from moe_vision.data.records import load_image, read_records
from moe_vision.export.card import training_of
from moe_vision.modeling.compose import load, save
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.search.journal import opened
from moe_vision.slicing import SLICING
from moe_vision.training.loading import load_schedule
from moe_vision.training.provenance import record_environment
from moe_vision.training.schedule import TrainConfig
from tests.fuzz.judge import WrongError, run_command
from tests.fuzz.mutations import ODD, ODD_TEXT, mutated, odd_bytes, odd_file, odd_text
from tests.tiny import tiny_model, tiny_values


@dataclass(frozen=True)
class Case:
    """what: of the input, for a report. names: texts of which a refusal has to hold one."""

    what: str
    work: Callable[[], Any]
    names: tuple[str, ...] = ()


def check(holds: bool, what: str) -> None:
    """Raise WrongError where something does not hold."""
    if not holds:
        raise WrongError(what)


def model_values() -> dict[str, Any]:
    return {
        **tiny_values(), "slicing": {"type": "uhd", "max_slices": 6}, "plugins": [],
        "branches": {"shared": True, "overview": {"mixer": {"type": "channel_concat", "grid": [4, 4]},
                                                  "adapter": {"type": "perceiver", "num_queries": 4}}},
    }  # fmt: skip


def train_values() -> dict[str, Any]:
    stage = {
        "name": "one", "train": {"adapters": 1e-3}, "epochs": 1, "batch_size": 2, "num_workers": 0, "save_steps": 5,
        "data": {"mixture": [{"synthetic": "captions", "scenes": 4, "weight": 1}, {"path": "d.json", "weight": 2}]},
    }  # fmt: skip
    return {"model": tiny_values(), "seed": 3, "stages": [stage, {**stage, "name": "two", "lora": None}]}


def text_of(values: dict[str, Any], random_: random.Random) -> str:
    """YAML of mutated values, or mutated YAML."""
    if random_.random() < 0.7:
        return yaml.safe_dump(mutated(values, random_)[0], allow_unicode=True)
    return odd_text(yaml.safe_dump(values), random_)


def yaml_case(folder: Path, random_: random.Random) -> Case:
    """A model config or a train config; what is accepted validates again to the same, and `show` can show it."""
    trains = random_.random() < 0.5
    text = text_of(train_values() if trains else model_values(), random_)
    path = folder / "config.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))

    def work() -> None:
        if trains:
            config: Any = load_schedule(TrainConfig, path)
            check(TrainConfig.model_validate(config.model_dump()) == config, "validates again to something else")
            return
        loaded = load_config(ModelConfig, path)
        check(ModelConfig.model_validate(loaded.to_plain()).to_plain() == loaded.to_plain(), "does not round-trip")
        raw = yaml.safe_load(text)
        check(list(loaded.experts) == list(raw["experts"]), "other experts than PyYAML reads")
        if random_.random() < 0.2:
            run_command(["show", str(path), "--json"])

    return Case(text, work, ("config.yaml", "experts", "branches", "language_model"))


KEYS = (
    "experts.clip.layer", "branches.overview.mixer.grid", "branches.overview.adapter.pool", "slicing.type", "experts",
    "language_model.image_token", "experts.sam", "plugins", "x", "branches.overview.adapter.depth",
    "language_model.architecture.hidden_size", "language_model.architecture.vocab_size",
)  # fmt: skip


def override_case(folder: Path, random_: random.Random) -> Case:
    """Overrides of the command line; an accepted one is in the config that `show` prints."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values()))
    keys = random_.choice(KEYS)
    odd = random_.choice(ODD)
    value = random_.choice([json.dumps(odd), random_.choice(ODD_TEXT), str(odd), "4", "[2, 2]"])
    override = f"{keys}={value}"
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = None

    def work() -> None:
        config: Any = json.loads(run_command(["show", str(path), override, "--json"]))["config"]
        for key in keys.split("."):
            config = config.get(key) if isinstance(config, dict) else None
        if isinstance(parsed, (int, list)) and not isinstance(parsed, bool):
            check(config == parsed, f"shows {config!r}")

    return Case(override, work, (keys.split(".")[0], "command line", "argument"))


def argument_case(folder: Path, random_: random.Random) -> Case:
    """Command lines of cheap commands with odd values."""
    height = random_.choice([0, 1, 7, 336, 10**6, 10**12, -3, "", "[/x]"])
    size = f"{height}x{random_.choice([1, 64, 10**9, 'y', '٣'])}"
    odd = str(random_.choice(ODD))[:300].replace("\0", "")
    place = random_.choice(["/dev/null", "/", str(folder), str(folder / "none"), "loop", "pipe", "\udcff", odd])
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    if place in ("loop", "pipe"):
        place = str(folder / place)
    policy = random_.choice([*SLICING, "uhdd", odd])
    line = random_.choice([
        ["plan", size, "--policy", policy], ["plan", size, place, "--policy", policy, "--json"],
        ["plan", size, "--policy", policy, "--set", f"{random_.choice(['max_slices', 'size', 'x', 'factor'])}={odd}"],
        ["plan", "9x9", "--policy", policy, "--frames", odd],
        ["plan", "9x9", "--policy", "tiles", "--images-per-prompt", odd],
        ["plan", size, "--config", place], ["show", place], ["show", place, odd], ["schema", odd], ["schema", "train"],
        ["generate", place, odd], ["eval", place, place], ["verify", place], ["export", place, "-o", place],
        ["train", place, "-o", place], ["compare", place, "--mixer", odd], ["search", place],
        ["import", "eagle", place], ["micro", "list", odd], [odd], [odd, place], ["--plugin", place, "schema"],
        ["micro", "rebuild", "--expert", odd],
        ["export", place, "-o", str(folder / "out"), "--metrics", place],
    ])  # fmt: skip

    def work() -> None:
        out = run_command(line)
        if line[0] == "plan" and "--json" in line:
            check(len(json.loads(out)) == 2, "another number of plans")

    return Case(repr(line), work)


def record_values(random_: random.Random) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "é"}]
    return [
        {"id": f"r{i}", "image": "p.png", "task": "t", "conversations": turns * random_.choice([1, 1, 1, 2])}
        for i in range(3)
    ]


def record_case(folder: Path, random_: random.Random) -> Case:
    """A file of records; those that are accepted alternate, and have their images and one marker for each."""
    Image.new("RGB", (8, 8)).save(folder / "p.png")
    values: Any = record_values(random_)
    if random_.random() < 0.7:
        values = mutated(values, random_)[0]
        lines = random_.random() < 0.3 and isinstance(values, list)
        text = "\n".join(map(json.dumps, values)) if lines else json.dumps(values)
        text = ("\ufeff" if random_.random() < 0.1 else "") + text
    else:
        text = odd_text(json.dumps(values, indent=1, ensure_ascii=False), random_)
    path = folder / random_.choice(["data.json", "data.json", "data.jsonl"])
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))

    def work() -> None:
        records, faults = read_records(path, folder)
        for record in records:
            check(all(image.is_file() for image in record.images), "an image that is not there")
            check(len(record.turns) % 2 == 0 or record.turns[0].role == "system", "turns that do not alternate")
            check(
                sum(turn.text.count("<image>") for turn in record.turns) == len(record.images), "markers without images"
            )
        check(all(str(fault) for fault in faults), "a fault without a text")
        json.dumps([fault.problem for fault in faults]).encode()

    return Case(text, work, (path.name,))


FORMATS = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"),
           "BMP": ("RGB", "L", "1"), "TIFF": ("RGB", "RGBA", "L", "I;16", "F", "I", "CMYK"), "WEBP": ("RGB", "RGBA"),
           "PPM": ("RGB", "L"), "TGA": ("RGB",), "PCX": ("RGB",)}  # fmt: skip


def image_case(folder: Path, random_: random.Random) -> Case:
    """An image file; what is decoded has the upright size that Pillow gives it, and plain colours stay."""
    kind = random_.choice(list(FORMATS))
    mode = random_.choice(FORMATS[kind])
    size = random_.choice([(1, 1), (5, 9), (64, 16), (33, 7)])
    picture = Image.new("RGB", size, (200, 60, 40)).convert("L" if mode in ("I;16", "F", "I", "LA") else mode)
    picture = picture.convert(mode) if picture.mode != mode else picture
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "TIFF", "WEBP") and random_.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = random_.choice([0, 1, 2, 3, 5, 6, 7, 8, 9, 65535])
        options["exif"] = exif
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    content, whole = buffer.getvalue(), random_.random() < 0.3
    if not whole:
        content = odd_bytes(content, random_)
    path = folder / f"image.{random_.choice(['png', 'jpg', 'tif', 'txt', 'eps'])}"
    path.write_bytes(content)

    def work() -> None:
        loaded = load_image(path)
        check(loaded.mode == "RGB", f"mode {loaded.mode}")
        with Image.open(path) as opened_:
            upright = ImageOps.exif_transpose(opened_)
        check(loaded.size == upright.size, f"size {loaded.size} instead of {upright.size}")
        if whole and mode == "RGB" and kind in ("PNG", "BMP", "TIFF", "PPM"):
            check(loaded.getpixel((0, 0)) == (200, 60, 40), f"colour {loaded.getpixel((0, 0))}")

    return Case(f"{kind} {mode} {size} {options} {'whole' if whole else 'damaged'}", work, (path.name,))


@functools.cache
def model_folder() -> tuple[Path, torch.Tensor]:
    """A saved model, and its logits."""
    folder = Path(tempfile.mkdtemp(prefix="moe-vision-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save(*tiny_model(("clip",)), folder / "model")
    return folder / "model", logits_of(folder / "model")


def logits_of(folder: Path) -> torch.Tensor:
    model, _ = load(folder)
    with torch.inference_mode():
        return model(torch.arange(3, 9)[None]).logits


def folder_case(folder: Path, random_: random.Random) -> Case:
    """A model folder in which one file is another; what loads has the same logits, if the weights are as they were."""
    source, logits = model_folder()
    target = Path(shutil.copytree(source, folder / "model"))
    name = random_.choice(sorted(path.name for path in target.iterdir() if path.suffix != ".py"))
    before = (target / "config.json").read_text(), (target / "model.safetensors").read_bytes()
    what = odd_file(target / name, random_)

    def work() -> None:
        found = logits_of(target)
        same = before == ((target / "config.json").read_text(), (target / "model.safetensors").read_bytes())
        check(not same or torch.equal(found, logits), "other logits from the same weights and config")

    return Case(f"{name}: {what}", work, (str(target), name, name.partition(".")[0]))


def run_case(folder: Path, random_: random.Random) -> Case:
    """Files that a run writes: its config and data report for the card, its environments, a search's journal."""
    stage = {"name": "a", "train": {"a": 0.1}, "prealign": None, "lora": None, "data": None, "max_steps": 3,
             "epochs": None, "batch_size": 2}  # fmt: skip
    schedule = {"seed": 3, "stages": [stage], "model": {"language_model": {"pretrained": None}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(schedule))
    (folder / "data_report.json").write_text(json.dumps({"01-a": [{"used": 3}]}))
    (folder / "environment.json").write_text('[{"python": "3.12"}]')
    with opened(folder):
        pass
    databases = sorted(path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size > 1000)
    name = random_.choice(["config.yaml", "data_report.json", "environment.json", *databases])
    what = odd_file(folder / name, random_)

    def work() -> None:
        if name in databases:
            with opened(folder):
                pass
        elif name == "environment.json":
            record_environment(folder / name)
        else:
            training_of(folder)

    return Case(f"{name}: {what}", work, (name, str(folder)))


AREAS: dict[str, Callable[[Path, random.Random], Case]] = {
    "yaml": yaml_case, "overrides": override_case, "arguments": argument_case, "records": record_case,
    "images": image_case, "folders": folder_case, "runs": run_case,
}  # fmt: skip

SHARES = {"yaml": 30, "overrides": 6, "arguments": 14, "records": 20, "images": 20, "folders": 5, "runs": 5}
"""Of a hundred cases; those of model folders take longest."""
