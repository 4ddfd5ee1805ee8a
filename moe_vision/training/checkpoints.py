"""Files and folders that are written whole or not at all, whatever ends the process: a kill, a full disk, a fault."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from moe_vision.files import WriteError, give_usual_modes

TORCH_WRITE_FAULTS = ("PytorchStreamWriter", "inline_container", "file write failed", "unexpected pos")
"""What torch's RuntimeErrors say when a file could not be written; it raises no OSError then."""


DIGESTS = "digests.json"
"""In a checkpoint: the XXH3 checksum of every other file in it, by its path there."""

BLOCK = 1 << 24


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Raise WriteError, with the folder and a cure, where a write in this block fails."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(said in str(error) for said in TORCH_WRITE_FAULTS):
            raise
        raise WriteError(f"{what} cannot be written below '{folder}' ({error}): make room there, or raise the stage's "
                         "save_steps, and give the same command again; it goes on from the last checkpoint"
                         ) from error  # fmt: skip


def sync(path: Path) -> None:
    """Have the system bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything below a folder, files before the folders that name them."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


def put_in_place(made: Path, target: Path) -> None:
    """Rename a finished folder to its name, after its content is on the disk; a whole one that is there stays, and
    `made` goes."""
    if target.is_dir():
        shutil.rmtree(made)
        return
    give_usual_modes(made)
    sync_tree(made)
    made.rename(target)
    sync(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder so that it is never half there under its name; `remove_leftovers` ends what a kill cuts short."""
    going = folder.with_name(f".{folder.name}.partial")
    folder.rename(going)
    shutil.rmtree(going)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Take away the `.….partial` files and folders that a kill left in a folder."""
    for leftover in folder.glob(".*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def digest_of_file(path: Path) -> str:
    """XXH3 of a file's bytes."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_digests(folder: Path, target: Path | None = None) -> None:
    """Note the checksum of every file of a finished folder, for `damage`. target: where, in the folder if null."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}
    write_atomically(target or folder / DIGESTS, json.dumps(digests, indent=1))


def damage(folder: Path, noted: Path | None = None) -> str | None:
    """What is wrong with a folder of `write_digests`: a file that is missing or was changed; None if nothing is."""
    try:
        digests = json.loads((noted or folder / DIGESTS).read_bytes())
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except ValueError:
        return f"{DIGESTS} is damaged"
    if not isinstance(digests, dict) or not digests:
        return f"{DIGESTS} is damaged"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest_of_file(folder / name) != digest:
            return f"{name} is damaged: it differs from its checksum"
    return None


def set_aside(folder: Path) -> Path:
    """Give a damaged folder a name under which nothing takes it for a whole one; returns it."""
    aside = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)
