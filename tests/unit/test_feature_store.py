"""Features on disk: bitwise what the experts made, mapped, checked, bounded, shared by processes."""

import json
import logging
import os
import random
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from moe_vision.data.records import Record, Turn, load_records
from moe_vision.evaluation import evaluate
from moe_vision.training.feature_store import SEGMENT_BYTES, FeatureStore, StoredMaps
from moe_vision.training.features import FeatureCache, KnownPictures, expert_maps, known_maps, pictures_of
from moe_vision.training.runner import train
from moe_vision.training.schedule import StageConfig, TrainConfig
from tests.tiny import tiny_model
from tests.unit.test_training import assert_same, weights
from tests.unit.toy import train_values

STAGE = StageConfig(name="x", train={"adapters": 1e-3}, epochs=1, batch_size=4)
GB = 1.0


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 30 + number), (40 * number, 200, 20)).save(path)
        paths.append(path)
    return paths


def maps(store: FeatureCache, paths: Sequence[Path], **options: Any) -> KnownPictures:
    model, processor = tiny_model(("clip", "sam"))
    known = known_maps(model, processor, paths, STAGE, {"adapters": 1.0}, store, **options)
    assert known is not None and known.maps is not None
    return known


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of each fill from now on."""
    from moe_vision.training import features

    found: list[int] = []
    fill = features.fill

    def filled(model: Any, processor: Any, stores: Any, missing: Any, stage: Any) -> None:
        found.append(sum(map(len, missing.values())))
        fill(model, processor, stores, missing, stage)

    monkeypatch.setattr(features, "fill", filled)
    return found


def test_what_is_kept_is_bitwise_what_was_made(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = maps(FeatureCache(), pictures)
    made = counted(monkeypatch)
    first = maps(FeatureStore(tmp_path / "store", GB), pictures)
    again = maps(FeatureStore(tmp_path / "store", GB), pictures)  # as another process would open it
    assert made == [12]
    for known in (first, again):
        for name in ("clip", "sam"):
            assert all(torch.equal(known.maps[name][path], fresh.maps[name][path]) for path in pictures)
    said = {json.loads(file.read_text())["made_by"] for file in (tmp_path / "store").glob("*/made_by.json")}
    assert said == {"expert 'clip'", "expert 'sam'"}
    assert len(list((tmp_path / "store").glob("*/*.safetensors"))) == 2


def test_maps_lie_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "digest"
    folder.mkdir()
    paths = [tmp_path / str(number) for number in range(96)]
    for path in paths:
        path.touch()
    stored = StoredMaps(folder, "digest", "test")
    for path in paths:
        stored.add([path], torch.randn(1, 1024, 32, 32))
    stored.flush()
    files = list(folder.glob("*.safetensors"))
    assert len(files) == 96 * 4 * 2**20 // SEGMENT_BYTES == 6
    opened = StoredMaps(folder, "digest", "test")
    before = private_bytes()
    assert opened.missing(paths) == []
    total = sum(opened[path].sum() for path in paths)
    assert torch.isfinite(total) and private_bytes() - before < 64 * 2**20  # of 384 MiB


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_another_picture_or_expert_is_another_entry(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    maps(FeatureStore(store, GB), pictures)
    made = counted(monkeypatch)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(pictures[0])
    os.utime(pictures[0], ns=(0, 1))
    changed = maps(FeatureStore(store, GB), pictures)
    assert made == [2]
    size = pictures[0].stat().st_size
    Image.new("RGB", (40, 30), (3, 2, 1)).save(pictures[0])
    os.utime(pictures[0], ns=(0, 2))
    assert pictures[0].stat().st_size == size  # the time alone tells them apart
    made.clear()
    changed = maps(FeatureStore(store, GB), pictures)
    assert made == [2]
    assert torch.equal(changed.maps["sam"][pictures[0]], maps(FeatureCache(), pictures).maps["sam"][pictures[0]])
    model, processor = tiny_model(("clip", "sam"))
    with torch.no_grad():
        next(model.model.vision_tower.experts["sam"].parameters()).add_(1)
    made.clear()
    known_maps(model, processor, pictures, STAGE, {"adapters": 1.0}, FeatureStore(store, GB))
    assert made == [6]  # sam's alone
    assert len(list(store.glob("*/made_by.json"))) == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "no header"])
def test_a_damaged_entry_is_named_and_made_again(
    tmp_path: Path, pictures: list[Path], damage: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = tmp_path / "store"
    maps(FeatureStore(store, GB), pictures)
    (file,) = [f for f in store.glob("*/*.safetensors") if "sam" in (f.parent / "made_by.json").read_text()]
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1  # in the last picture's map
    file.write_bytes({"flipped": content, "cut": content[:-100], "no header": b"x" * 100}[damage])
    made = counted(monkeypatch)
    with caplog.at_level(logging.WARNING):
        known = maps(FeatureStore(store, GB), pictures)
    assert "feature store, expert 'sam': " in caplog.text and str(file) in caplog.text
    assert damage != "flipped" or f"the map of '{pictures[-1]}'" in caplog.text
    assert made == [1 if damage == "flipped" else 6] or made == [6]
    fresh = maps(FeatureCache(), pictures)
    assert all(torch.equal(known.maps["sam"][path], fresh.maps["sam"][path]) for path in pictures)
    made.clear()
    caplog.clear()
    maps(FeatureStore(store, GB), pictures)
    assert not file.exists() and not caplog.text
    assert made in ([], [5])  # what shared the damaged file and had been checked before is made when it is needed


def test_a_full_store_lets_the_oldest_go_first(
    tmp_path: Path, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    maps(FeatureStore(store, GB), pictures)
    size = sum(file.stat().st_size for file in store.glob("*/*.safetensors"))
    for folder in store.iterdir():
        os.utime(folder, (0, 0))
    model, processor = tiny_model(("clip", "sam"), seed=1)
    limit = 1.5 * size / 1e9
    fits = known_maps(model, processor, pictures, STAGE, {"adapters": 1.0}, FeatureStore(store, limit))
    assert fits is not None
    assert sum(file.stat().st_size for file in store.glob("*/*.safetensors")) <= limit * 1e9
    tight = FeatureStore(tmp_path / "tight", 0.5 * size / 1e9)
    with caplog.at_level(logging.WARNING):
        assert known_maps(model, processor, pictures, STAGE, {"adapters": 1.0}, tight) is None
    assert "experts run on pixels; give it more gigabytes, or none" in caplog.text
    with pytest.raises(ValueError, match="maps of clip, sam of 6 pictures do not fit into the feature cache"):
        expert_maps(model, processor, pictures, ["clip", "sam"], STAGE, tight)


def in_processes(count: int, work: Callable[[int], None]) -> list[int]:
    """Exit codes of forked children that do `work(number)`."""
    children = []
    for number in range(count):
        if (child := os.fork()) == 0:
            code = 1
            try:
                work(number)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_processes_make_each_map_once(tmp_path: Path, pictures: list[Path]) -> None:
    assert in_processes(3, lambda _: maps(FeatureStore(tmp_path / "store", GB), pictures) and None) == [0, 0, 0]
    assert len(list((tmp_path / "store").glob("*/*.safetensors"))) == 2


def test_processes_fill_and_make_room_at_once(tmp_path: Path, pictures: list[Path]) -> None:
    def fill(number: int) -> None:
        for turn in range(30):
            store = FeatureStore(tmp_path / "store", 3 * 6 * 4096 / 1e9)  # three digests of the eight
            value = random.Random(100 * number + turn).randrange(8)
            kept = store.of(f"{value:032d}", "test")
            if missing := kept.missing(pictures):
                store.has_room(len(missing) * 4096, 0, 0)
                with store.filling([kept]):
                    if missing := kept.missing(pictures):
                        kept.add(missing, torch.full((len(missing), 1024), float(value)))
                        kept.flush()
            assert kept.missing(pictures) == [] and all((kept[path] == value).all() for path in pictures)

    assert in_processes(4, fill) == [0] * 4
    for folder in (tmp_path / "store").glob("[!.]*"):
        assert len(list(folder.glob("*.safetensors"))) == 1 and (folder / "made_by.json").is_file()


def test_what_a_kill_left_is_taken_away(tmp_path: Path, pictures: list[Path]) -> None:
    store = tmp_path / "store"
    maps(FeatureStore(store, GB), pictures[:3])
    folder = next(store.iterdir())
    (folder / ".abc.safetensors.partial").write_bytes(b"half")
    maps(FeatureStore(store, GB), pictures)
    assert not list(store.glob("*/.*.partial"))


def test_training_from_the_store_is_bitwise_training_without(tmp_path: Path) -> None:
    values = train_values(tmp_path)
    values["stages"][1]["train"]["experts.sam"] = 1e-3  # unlocked: runs on pixels, from the store too
    bare = {**values, "stages": [{**stage, "cache_features": False} for stage in values["stages"]]}
    quiet = Console(quiet=True)
    without = train(TrainConfig.model_validate(bare), tmp_path / "bare", console=quiet)
    for output in ("first", "second"):
        store = FeatureStore(tmp_path / "store", GB)
        stored = train(TrainConfig.model_validate(values), tmp_path / output, console=quiet, cache=store)
        assert_same(weights(without), weights(stored))
    said = [json.loads(f.read_text())["made_by"] for f in (tmp_path / "store").glob("*/made_by.json")]
    assert sorted(said) == ["expert 'clip'", "expert 'sam'", "pixels"]  # sam once: as it was when it was frozen


def test_an_evaluation_from_maps_answers_alike(tmp_path: Path) -> None:
    values = train_values(tmp_path)
    records = load_records(tmp_path / "data" / "data.json")
    records += [Record("text", (), (Turn("user", "is it black"), Turn("assistant", "no")))]
    model, processor = tiny_model(("clip", "sam"))
    known = known_maps(
        model, processor, pictures_of(records), STAGE, {"experts.clip": 1.0}, FeatureStore(tmp_path / "store", GB)
    )
    assert known is not None and known.pixels is not None and list(known.maps or {}) == ["sam"]
    expected = evaluate(model, processor, records, max_new_tokens=4)
    assert evaluate(model, processor, records, max_new_tokens=4, pictures=known) == expected
    shutil.rmtree(tmp_path / "data")
    assert evaluate(model, processor, records, max_new_tokens=4, pictures=known) == expected  # no picture is opened
    assert len(values["stages"]) == 2
