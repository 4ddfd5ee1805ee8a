"""What frozen experts made of pictures, kept on disk: mapped into memory, checked, bounded, shared by processes.

FOLDER/DIGEST/made_by.json      which expert, for people        FOLDER/DIGEST/*.safetensors  maps [n, …] of n pictures
FOLDER/.DIGEST.lock             held by who writes DIGEST, or takes it away

A digest names all that makes the maps, the expert's weights among it, so that an entry is never wrong, only unused. A
picture is known by its path, size and time of change. Files are written whole and never change.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe_vision.files import give_usual_modes
from moe_vision.training.checkpoints import remove_leftovers, sync, write_atomically, writing
from moe_vision.training.features import FeatureCache, Maps

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * 2**20
"""How much is written to one file."""


@dataclass(frozen=True)
class Entry:
    """Where the map of a picture lies."""

    file: Path
    row: int
    checksum: int


class FeatureStore(FeatureCache):
    """A FeatureCache below a folder, of at most so many gigabytes; the digest that was not used for the longest time
    goes first. Any number of processes may share it.
    """

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder, self.limit = folder, gigabytes * 1e9
        self.opened: dict[str, StoredMaps] = {}

    def of(self, digest: str, made_by: str) -> "StoredMaps":
        if digest not in self.opened:
            self.opened[digest] = StoredMaps(self.folder / digest[:32], digest, made_by)
        return self.opened[digest]

    def size(self) -> int:
        files = (file for folder in self.folder.glob("[!.]*") for file in files_of(folder))
        return sum(found.st_size for file in files if (found := stat_of(file)))

    def has_room(self, new: int, beside: int, cache_bytes: float) -> bool:
        """Whether so many bytes more fit, after what this process does not use has gone, the oldest first. What lies
        `beside` is in memory, which `cache_bytes` bounds; what is here is not."""
        if beside > cache_bytes:
            return False
        used = {maps.folder for maps in self.opened.values()}
        others = [
            (found.st_mtime, folder)
            for folder in self.folder.glob("[!.]*")
            if folder not in used and (found := stat_of(folder))
        ]
        for _, folder in sorted(others):
            if self.size() + new <= self.limit:
                break
            with suppress(Timeout), lock_of(folder).acquire(timeout=0):  # else somebody is writing it
                shutil.rmtree(folder, ignore_errors=True)  # a process that has its files mapped keeps them
        if self.size() + new > self.limit:
            logger.warning(
                "feature store '%s' holds at most %.3g GB and would need %.3g: experts run on pixels; give it more "
                "gigabytes, or none", self.folder, self.limit / 1e9, (self.size() + new) / 1e9,
            )  # fmt: skip
            return False
        return True

    @contextmanager
    def filling(self, stores: Sequence[Maps]) -> Iterator[None]:
        """Nobody else adds to these in this block, so that no map is made twice, or takes them away."""
        kept = sorted((store for store in stores if isinstance(store, StoredMaps)), key=lambda store: store.folder)
        with ExitStack() as stack:
            with writing("the feature store", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for store in kept:
                    stack.enter_context(lock_of(store.folder))
                    store.begin()
            yield


def stat_of(path: Path) -> os.stat_result | None:
    """None if another process has just taken it away."""
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def files_of(folder: Path) -> list[Path]:
    """The files with maps of one digest; none if another process has just taken them away."""
    with suppress(FileNotFoundError):
        return sorted(folder.glob("*.safetensors"))
    return []


def lock_of(folder: Path) -> FileLock:
    """Of one digest; beside its folder, which may be taken away."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


class StoredMaps(Maps):
    """Maps of one digest. Each is compared with its checksum before this process first gives it out; a file with a
    damaged one is removed, with a warning that names picture and file, and its pictures are missing then."""

    def __init__(self, folder: Path, digest: str, made_by: str) -> None:
        super().__init__()
        self.folder, self.digest, self.made_by = folder, digest, made_by
        self.entries: dict[str, Entry] = {}
        self.files: dict[Path, torch.Tensor] = {}
        self.pending: dict[Path, torch.Tensor] = {}

    def begin(self) -> None:
        """Make the folder, or clean it of what a kill left; nobody else writes it now."""
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        said = self.folder / "made_by.json"
        if not said.is_file():
            write_atomically(said, json.dumps({"made_by": self.made_by, "digest": self.digest}))

    def missing(self, paths: Sequence[Path]) -> list[Path]:
        self.read_new_files()
        return [path for path in paths if path not in self and not self.check(path)]

    def read_new_files(self) -> None:
        """Learn what other processes have added."""
        for file in files_of(self.folder):
            if file in self.files:
                continue
            try:
                with safe_open(file, framework="pt") as opened:
                    listed = json.loads(opened.metadata()["pictures"])
                    self.files[file] = opened.get_tensor("maps")
            except (OSError, RuntimeError):  # torch raises the latter
                if file.exists():
                    raise
                continue  # another process needed the room, or found it damaged
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                self.remove(file, f"file '{file}' is damaged ({error})")
                continue
            for row, (picture, checksum) in enumerate(listed):
                self.entries.setdefault(picture, Entry(file, row, checksum))
        with suppress(FileNotFoundError):  # nothing was kept yet, or another process needed the room
            os.utime(self.folder)  # used now: others go first

    def check(self, path: Path) -> bool:
        """Whether the map of a picture is here and whole."""
        entry = self.entries.get(picture_key(path))
        if entry is None:
            return False
        found = self.files[entry.file][entry.row]
        if checksum_of(found) != entry.checksum:
            self.remove(entry.file, f"the map of '{path}' in '{entry.file}' does not match its checksum")
            return False
        self.kept[path] = found
        return True

    def remove(self, file: Path, why: str) -> None:
        """Take a damaged file away; its pictures are made again."""
        logger.warning("feature store, %s: %s; it is removed, and its pictures are encoded again", self.made_by, why)
        self.entries = {key: entry for key, entry in self.entries.items() if entry.file != file}
        self.files.pop(file, None)
        file.unlink(missing_ok=True)

    def add(self, paths: Sequence[Path], maps: torch.Tensor) -> None:
        for path, made in zip(paths, maps, strict=True):
            if path not in self:
                self.kept[path] = self.pending[path] = made
        if len(self.pending) * maps[0].nbytes >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added, whole or not at all. Raises WriteError."""
        if not self.pending:
            return
        maps = torch.stack(list(self.pending.values())).contiguous()
        listed = [(picture_key(path), checksum_of(made)) for path, made in self.pending.items()]
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = file.with_name(f".{file.name}.partial")
        with writing("the feature store", self.folder):
            save_file({"maps": maps}, temporary, metadata={"pictures": json.dumps(listed)})
            sync(temporary)
            give_usual_modes(temporary)
            temporary.replace(file)
            sync(self.folder)
        # From here on the pictures' maps are those of the file, which the system may drop from memory and read again.
        with safe_open(file, framework="pt") as opened:
            self.files[file] = mapped = opened.get_tensor("maps")
        for row, (path, (key, checksum)) in enumerate(zip(self.pending, listed, strict=True)):
            self.entries[key] = Entry(file, row, checksum)
            self.kept[path] = mapped[row]
        self.pending = {}


def picture_key(path: Path) -> str:
    """Names a picture as it lies on the disk now."""
    found = path.stat()
    return hashlib.sha256(f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}".encode()).hexdigest()[:32]


def checksum_of(value: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(value.contiguous().reshape(-1).view(torch.uint8).numpy())
