"""An exported folder: weights, one file of code, processor, tokenizer, card; proven before it appears."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HfHubHTTPError, validate_repo_id
from PIL import Image
from safetensors.torch import save_file

from moe_vision.export import selftest
from moe_vision.export.card import model_card, training_of
from moe_vision.export.leftovers import MARK, clear_killed_exports, locked, remove_unused, workplace
from moe_vision.files import give_usual_modes, resolved, writing
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import load, model_folder
from moe_vision.modeling.flatten import MODULE_NAME, flatten
from moe_vision.registry import suggest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit: code and weights are the same, only sums over threads may differ."""

SUFFIXES = {".json", ".jinja", ".md", ".py", ".safetensors", ".model", ".txt"}
"""Of an export's files: a folder with others is somebody's, and not overwritten."""

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


class ExportError(ValueError):
    """An export that was refused or that failed its self-test; nothing was left at the destination."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the self-test saw. url: of the repository on the Hub, if it was pushed there."""

    destination: str
    files: tuple[str, ...]
    bytes: int
    dtype: str
    max_difference: float
    new_tokens: int
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "files": list(self.files)}

    def summary(self) -> str:
        return (
            f"exported to {self.destination}: {len(self.files)} files, {self.bytes / 1e6:.1f} MB, "
            f"{self.dtype}\nself-test without moe_vision: loaded, logits within {self.max_difference:.3g} of "
            f"the source model, generated {self.new_tokens} tokens" + (f"\npushed to {self.url}" if self.url else "")
        )


def export(
    source: Path | str,
    destination: Path | str,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    metrics: Mapping[str, Any] | None = None,
    plugins: Sequence[Path] = (),
    push: str | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write a folder that `transformers` loads without moe_vision, and prove it in a second process.

    source: a folder that `save_pretrained` of model and processor wrote, or a run's output that has one.
    dtype: float32, bfloat16 or float16; the saved one by default. metrics: results for the card. push: repository on
    the Hub, as `name/model`, that gets the folder after it has proven itself; `private` if it has to be made.
    Raises ExportError where the destination is taken, the self-test or the push fails, ValueError where source, dtype
    or the repository's name is wrong.
    """
    source, destination = Path(source), Path(destination)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype '{dtype}': {suggest(dtype, list(DTYPES))}")
    check_shard_size(max_shard_size)
    if private and push is None:
        raise ValueError("private is of the repository that `push` makes: name one, or leave it out")
    if push is not None:
        check_push(push)
    source = model_folder(source)
    clear_killed_exports(destination)
    check_destination(source, destination, overwrite)
    # Loaded in the dtype and not cast to it: a cast would round buffers that loading keeps in fp32.
    model, processor = load(source, DTYPES[dtype] if dtype is not None else None)
    code = flatten(model.config, plugins)
    card = model_card(model, processor, metrics, training_of(source.parent) if source.name == "model" else None)
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    try:
        with writing("export", destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            with locked(partial):
                (partial / MARK).touch()
                write_folder(partial, model, processor, code, max_shard_size, card)
                result = run_selftest(partial, model, processor)
                put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = tuple(sorted(str(p.relative_to(destination)) for p in destination.rglob("*") if p.is_file()))
    url = None if push is None else pushed(destination, push, private=private)
    return ExportReport(
        destination=str(destination),
        files=files,
        bytes=sum((destination / name).stat().st_size for name in files),
        dtype=str(model.dtype).removeprefix("torch."),
        max_difference=result["max_difference"],
        new_tokens=result["new_tokens"],
        url=url,
    )


def verify(folder: Path | str) -> dict[str, Any]:
    """Prove a folder that was exported, or saved by `save_pretrained`, as an export proves itself.

    folder: a model folder, or a run's output that has one. Returns {max_difference, new_tokens, model_class}.
    Raises ValueError where its weights are not those of its config, ExportError where it fails in a process without
    moe_vision.
    """
    folder = model_folder(Path(folder))
    return run_selftest(folder, *load(folder))


def check_shard_size(text: str) -> None:
    """Raises ValueError where it is no size as huggingface_hub reads it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *[KMGT]B", text.upper())
    if found is None or not float(found[1]):
        raise ValueError(f"max_shard_size '{text}' is no size: give one such as 5GB or 200MB")


def check_push(repository: str) -> None:
    """Raises ValueError where the name is none, ExportError where nobody is logged in: before any work is done."""
    validate_repo_id(repository)
    if get_token() is None:
        raise ExportError(
            f"pushing to '{repository}' needs a token of the Hub: run `hf auth login`, or set HF_TOKEN, or leave it out"
        )


def pushed(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder in one commit and return its address. Raises ExportError; the folder stays."""
    try:
        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        # What an earlier export left there, shards of another size or a pickle, must not lie beside this one.
        return str(api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export by moe-vision", delete_patterns=["*"]
        ).repo_url)  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(
            f"'{folder}' is whole, but could not be pushed to '{repository}' ({error}): see to the cause, and give "
            f"`hf upload {repository} {folder}`"
        ) from error


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Raise ExportError where writing to `destination` would lose something."""
    here, there = resolved(source), resolved(destination)
    if here == there or there in here.parents:
        raise ExportError(f"the destination '{destination}' holds the source '{source}': choose another folder")
    if here in there.parents:
        raise ExportError(f"the destination '{destination}' lies in the source '{source}': choose another folder")
    if destination.is_symlink():
        raise ExportError(f"the destination '{destination}' is a link: give '{there}', to which it leads")
    if destination.exists() and not destination.is_dir():
        raise ExportError(f"the destination '{destination}' is a file: choose another name")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"the destination '{destination}' is not empty: choose another folder, or overwrite it")
    foreign = [path.name for path in destination.iterdir() if path.is_dir() or path.suffix not in SUFFIXES]
    if foreign or not (destination / f"{MODULE_NAME}.py").is_file():
        because = f", it holds {sorted(foreign)[:4]}" if foreign else ""
        raise ExportError(
            f"the destination '{destination}' is no export{because} and will not be overwritten: choose another"
        )


def write_folder(
    folder: Path,
    model: MoeVisionForConditionalGeneration,
    processor: MoeVisionProcessor,
    code: str,
    max_shard_size: str,
    card: str,
) -> None:
    """Write everything that the folder holds."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    (folder / f"{MODULE_NAME}.py").write_text(code, encoding="utf-8")  # with plug-ins that only the caller names
    (folder / "README.md").write_text(card, encoding="utf-8")
    pickles = [path.name for path in folder.rglob("*") if path.suffix in PICKLES]
    if pickles:
        raise ExportError(f"the folder would hold pickles, {pickles}: an export has safetensors only")
    give_usual_modes(folder)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def run_selftest(
    folder: Path, model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor
) -> dict[str, Any]:
    """Load and run the folder offline in a process without moe_vision. Raises ExportError with its output."""
    with workplace() as place:
        write_fixture(place, model, processor)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {
            "HF_HOME": str(place / "home"),
            "HF_MODULES_CACHE": str(place / "modules"),
            "HF_HUB_OFFLINE": "1",
            # On the CPU as the expected logits are: another device sums in another order.
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        child = subprocess.run(
            [sys.executable, str(Path(selftest.__file__).resolve()), str(folder.resolve()), str(place)],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
    if child.returncode:
        output = (child.stdout + child.stderr).strip()[-4000:]
        raise ExportError(f"'{folder}' failed the self-test in a process without moe_vision:\n{output}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def write_fixture(folder: Path, model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor) -> None:
    """Write one picture, one question and what the source model makes of them."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    if processor.chat_template:
        content: Any = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    else:
        text = f"{processor.image_token} What is this?"
    inputs = processor(images=Image.open(folder / "image.png"), text=text, return_tensors="pt")
    expected = {name: inputs[name].contiguous() for name in ("input_ids", "pixel_values")}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        logits = model(**inputs).logits.float()
    save_file({**expected, "logits": logits.contiguous()}, folder / "expected.safetensors")
    write_json(folder / "fixture.json", {"text": text, "atol": TOLERANCES[model.dtype]})


def put_in_place(partial: Path, destination: Path) -> None:
    """Rename a finished folder to its place; an older one there moves aside first and is removed last."""
    (partial / MARK).unlink()
    if not destination.exists():
        partial.rename(destination)
        return
    aside = destination.parent / f".{destination.name}.replaced-{os.getpid()}"
    with locked(destination):
        destination.rename(aside)
        try:
            partial.rename(destination)
        except OSError:
            aside.rename(destination)
            raise
    remove_unused(aside)
