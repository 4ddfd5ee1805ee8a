"""Each fault is fatal or skipped, as the config says; what is skipped is counted and listed, never replaced."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from moe_vision.data import records as records_module
from moe_vision.data.chat import IGNORED, tokenise
from moe_vision.data.faults import DataError
from moe_vision.data.records import load_records
from moe_vision.data.samples import Samples, samples_of
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.training.data import read_data
from moe_vision.training.runner import train
from moe_vision.training.schedule import DataConfig, TrainConfig
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model
from tests.unit.toy import train_values, write_data

Values = list[dict[str, Any]]


@pytest.fixture(scope="module")
def processor() -> MoeVisionProcessor:
    return tiny_model()[1]


def written(folder: Path, count: int = 4) -> tuple[Path, Values]:
    """A good file of so many records, and its values."""
    path = write_data(folder, count)
    return path, json.loads(path.read_text())


def ask(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def cut_off(path: Path) -> None:
    """Leave a picture its header and a part of its pixels."""
    Image.effect_noise((64, 64), 50).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def samples(processor: MoeVisionProcessor, context: int | None = None, **data: Any) -> Samples:
    """What a run would learn from."""
    folder = Path(data["path"]).parent
    return samples_of(read_data(DataConfig(**data), folder, seed=0, workers=2), processor, context, seed=0)


def spoil(kind: str, values: Values, folder: Path) -> None:
    """Make the second record wrong."""
    if kind == "format":
        values[1]["conversations"] = ask("<image>what", "red", "and now")
    elif kind == "markers without image":
        values[1] |= {"image": [], "conversations": ask("<image>\nwhat", "red")}
    elif kind == "image without marker":
        values[1] |= {"image": ["1.png", "2.png"], "conversations": ask("what", "red", "and now", "blue")}
    elif kind == "missing":
        values[1]["image"] = "none.png"
    elif kind == "no picture":
        (folder / "1.png").write_bytes(b"no picture")
    elif kind == "too long":
        values[1]["conversations"] = ask("<image>\nwhat", "red " * 300)


FAULTS = [
    ("format", "format", "must alternate"),
    ("markers without image", "markers", "0 images and 1 <image> markers; name each image"),
    ("image without marker", "markers", "2 images and 0 <image> markers; put one marker"),
    ("missing", "image_missing", r"none\.png': no such file"),
    ("no picture", "image_broken", r"1\.png': cannot be read"),
    ("too long", "too_long", r"record '1': has \d+ tokens, those of its images among them, and 256 fit"),
]


@pytest.mark.parametrize(("kind", "reason", "said"), FAULTS)
def test_a_fault_is_fatal_or_skipped(
    tmp_path: Path, processor: MoeVisionProcessor, kind: str, reason: str, said: str
) -> None:
    path, values = written(tmp_path)
    spoil(kind, values, tmp_path)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=said):
        samples(processor, 256, path=str(path))
    left = samples(processor, 256, path=str(path), on_fault="skip")
    assert [record.id for record in left.records] == ["0", "2", "3"]
    (report,) = left.reports
    assert (report.read, report.used, report.samples, report.counts) == (4, 3, 3, {reason: 1})
    assert [(fault.id, fault.reason) for fault in report.skipped] == [("1", reason)]


@pytest.mark.parametrize("on_fault", ["fatal", "skip"])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("data.json", '[{"id": 1,', "is not JSON"),
        ("data.json", '{"id": 1}', "not a list"),
        ("data.json", "[]", "holds no record"),
        ("data.jsonl", "\n", "holds no record"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_always_fatal(
    tmp_path: Path, processor: MoeVisionProcessor, on_fault: str, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        samples(processor, path=str(tmp_path / name), on_fault=on_fault)


def test_a_line_that_is_no_json_is_fatal_or_skipped(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    _, values = written(tmp_path)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join([json.dumps(values[0]), "{oops", json.dumps(values[2])]))
    with pytest.raises(DataError, match="line 2 is not JSON"):
        samples(processor, path=str(lines))
    left = samples(processor, path=str(lines), on_fault="skip")
    assert [record.id for record in left.records] == ["0", "2"]
    assert [(fault.id, fault.reason) for fault in left.reports[0].skipped] == [("line 2", "format")]


def test_if_all_are_skipped_there_is_nothing_to_learn(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    path, _ = written(tmp_path)
    with pytest.raises(DataError, match=r"all 4 records are skipped[\s\S]*record '0': has \d+ tokens"):
        samples(processor, path=str(path), on_fault="skip", max_length=3)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match=r"all 4 records are skipped[\s\S]*0\.png': no such file"):
        samples(processor, path=str(path), on_fault="skip")


def test_a_record_that_just_fits_is_kept(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    path, _ = written(tmp_path, 1)
    length = len(tokenise(load_records(path)[0], processor).input_ids)
    assert len(samples(processor, path=str(path), max_length=length).items) == 1
    with pytest.raises(DataError, match=f"has {length} tokens.*{length - 1} fit"):
        samples(processor, path=str(path), max_length=length - 1)
    with pytest.raises(ValueError, match=f"max_length {length} is beyond the language model's context of {length - 1}"):
        samples(processor, length - 1, path=str(path), max_length=length)


def test_another_number_of_records_is_refused(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    path, _ = written(tmp_path)
    assert len(samples(processor, path=str(path), records=4).items) == 4
    with pytest.raises(DataError, match="holds 4 records, and the config says 5"):
        samples(processor, path=str(path), records=5)


def test_lengths_are_known_before_a_picture_is_decoded(
    tmp_path: Path, processor: MoeVisionProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, values = written(tmp_path)
    spoil("too long", values, tmp_path)
    path.write_text(json.dumps(values))

    def decode(path: Path) -> Image.Image:
        raise AssertionError(f"{path} is decoded")

    monkeypatch.setattr(records_module, "load_image", decode)
    with pytest.raises(DataError, match="256 fit"):
        samples(processor, 256, path=str(path))


def test_a_size_that_the_slicing_refuses_is_fatal_or_skipped(tmp_path: Path) -> None:
    slicing = tiny_model(**COMPOSITIONS["native"])[1]
    path, _ = written(tmp_path)
    Image.new("RGB", (2010, 10)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1\.png': an image of 10x2010 pixels is longer than 200 times"):
        samples(slicing, path=str(path))
    left = samples(slicing, path=str(path), on_fault="skip")
    assert [record.id for record in left.records] == ["0", "2", "3"]
    assert left.reports[0].counts == {"image_size": 1}


def corrupted(folder: Path, **stage: Any) -> tuple[TrainConfig, list[str]]:
    """A schedule of one stage over twenty records, of which the pictures of two are cut off; and the ids of these."""
    values = train_values(folder, max_steps=2, save_steps=10, **stage)
    path = write_data(folder / "data", 20)
    for name in ("7", "13"):
        cut_off(folder / "data" / f"{name}.png")
    values["stages"] = values["stages"][:1]
    values["stages"][0]["data"] = {"path": str(path), **stage.get("data", {})}
    return TrainConfig.model_validate(values), ["7", "13"]


@pytest.mark.parametrize("stage", [{}, {"cache_features": False, "num_workers": 1, "batch_size": 20}])
def test_pictures_that_are_cut_off_stop_a_run(tmp_path: Path, stage: dict[str, Any]) -> None:
    schedule, _ = corrupted(tmp_path, **stage)
    with pytest.raises(ValueError, match=r"(7|13)\.png'.*cannot be decoded.*truncated"):
        train(schedule, tmp_path / "out")


def test_a_tenth_of_cut_off_pictures_is_skipped_and_listed(tmp_path: Path) -> None:
    schedule, broken = corrupted(tmp_path, data={"on_fault": "skip"}, batch_size=18, cache_features=False)
    said = Console(file=io.StringIO(), width=300)
    train(schedule, tmp_path / "out", console=said)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())["01-projector"][0]
    assert (report["read"], report["used"], report["skipped"]) == (20, 18, {"image_broken": 2})
    assert [record["id"] for record in report["records"]] == broken
    assert all("truncated" in record["problem"] for record in report["records"])
    lines = [line for line in said.file.getvalue().splitlines() if "skipped" in line]
    assert len(lines) == 1 and "2 of 20 records are skipped (2 image_broken); listed in" in lines[0]


def test_faults_leave_neither_output_nor_a_trace_of_one(tmp_path: Path) -> None:
    schedule, _ = corrupted(tmp_path, data={"max_length": 5})
    with pytest.raises(DataError, match="20 problems"):
        train(schedule, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_what_is_left_read_back_as_its_answers(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    path, values = written(tmp_path)
    spoil("image without marker", values, tmp_path)
    path.write_text(json.dumps(values))
    end = processor.tokenizer.eos_token
    for item in samples(processor, path=str(path), on_fault="skip").items:
        learnt = [label for label in item.text.labels if label != IGNORED]
        answers = [turn["value"] for turn in values[int(item.record.id)]["conversations"] if turn["from"] == "gpt"]
        read = processor.tokenizer.decode(learnt)
        assert [text.strip() for text in read.split(end)] == [*answers, ""]
