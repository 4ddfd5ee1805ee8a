"""Tables of Hugging Face datasets and mixtures give a LLaVA file's records, in the same shares each time."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from moe_vision.config import ConfigError, validate
from moe_vision.config_paths import absolute
from moe_vision.data.config import DataConfig
from moe_vision.data.faults import DataError
from moe_vision.data.records import Record, load_image, load_records
from moe_vision.data.samples import Source, mix, shares
from moe_vision.training.data import STAGING, on_disk, read_data, records_of
from moe_vision.training.output import OutputError
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.unit.toy import COLOURS, train_values, write_data

QUESTIONS = {"images": "picture", "question": "ask", "answer": "say", "id": "name"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (20 + index, 30), COLOURS[index % len(COLOURS)])


def table(count: int = 4, **more: list[Any]) -> datasets.Dataset:
    """Questions about one picture each, which lies in the table."""
    columns = {
        "picture": [picture(i) for i in range(count)],
        "ask": ["which colour is it"] * count,
        "say": [COLOURS[i % len(COLOURS)] for i in range(count)],
        "name": list(range(100, 100 + count)),
    }
    return datasets.Dataset.from_dict(columns | more)


def records(folder: Path, **data: Any) -> list[Record]:
    return records_of(DataConfig(**data), folder / "data", seed=0)


def test_a_saved_table_gives_the_records_of_a_file(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    found = records(tmp_path, dataset=str(tmp_path / "saved"), columns=QUESTIONS)
    assert [record.id for record in found] == ["100", "101", "102", "103"]
    assert [record.turns[1].text for record in found] == list(COLOURS)
    assert {record.turns[0].text for record in found} == {"<image>\nwhich colour is it"}
    assert [load_image(record.images[0]).size for record in found] == [(20 + i, 30) for i in range(4)]
    assert all(load_image(r.images[0]).getpixel((0, 0)) == picture(i).getpixel((0, 0)) for i, r in enumerate(found))


def test_a_table_is_written_once_and_equal_pictures_once(tmp_path: Path) -> None:
    table(4, picture=[picture(0)] * 4).save_to_disk(tmp_path / "saved")
    first = records(tmp_path, dataset=str(tmp_path / "saved"), columns=QUESTIONS)
    files = sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    times = [path.stat().st_mtime_ns for path in files]
    assert len({image for record in first for image in record.images}) == 1 and len(files) == 2
    assert records(tmp_path, dataset=str(tmp_path / "saved"), columns=QUESTIONS) == first
    assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "<image><image>\nsame"}, {"from": "gpt", "value": "no"}],
        [{"role": "user", "content": "<image><image>\nsame"}, {"role": "assistant", "content": "no"}],
    ],
)
def test_conversations_with_lists_of_pictures(tmp_path: Path, turns: list[dict[str, str]]) -> None:
    columns = {"pictures": [[picture(0), picture(1)]], "talk": [turns], "kind": ["pairs"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    named = {"images": "pictures", "conversations": "talk", "task": "kind"}
    (found,) = records(tmp_path, dataset=str(tmp_path / "saved"), columns=named)
    assert [load_image(path).size for path in found.images] == [(20, 30), (21, 30)]
    assert (found.task, [turn.role for turn in found.turns]) == ("pairs", ["user", "assistant"])


def test_files_with_paths_keep_the_pictures_where_they_are(tmp_path: Path) -> None:
    path = write_data(tmp_path / "source", 3)
    rows = [{"picture": f"{i}.png", "ask": "what is it", "say": "red"} for i in range(3)]
    lines = tmp_path / "source" / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    named = {key: QUESTIONS[key] for key in ("images", "question", "answer")}
    found = records(tmp_path, dataset=str(lines), columns=named, split="train[:2]")
    assert [record.images[0] for record in found] == [path.parent / "0.png", path.parent / "1.png"]
    (tmp_path / "elsewhere").mkdir()
    (path.parent / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    moved = records(
        tmp_path, dataset=str(lines), columns=named, split="train[:1]", image_root=str(tmp_path / "elsewhere")
    )
    assert moved[0].images == (tmp_path / "elsewhere" / "0.png",)


def test_a_folder_of_pictures_with_a_table_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,ask,say\n0.png,what,red\n1.png,what,green\n")
    named = {"images": "image", "question": "ask", "answer": "say"}
    found = records(tmp_path, dataset=str(folder), columns=named)
    assert [(record.images, record.turns[1].text) for record in found] == [
        ((folder / "0.png",), "red"),
        ((folder / "1.png",), "green"),
    ]
    assert not list((tmp_path / "data").rglob("pictures/*"))


def test_a_stream_is_read_as_far_as_records_say(tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "rows.parquet")
    stream = {"dataset": str(tmp_path / "rows.parquet"), "columns": QUESTIONS, "streaming": True}
    found = records(tmp_path, **stream, records=3)
    assert [record.id for record in found] == ["100", "101", "102"]
    whole = records(tmp_path, dataset=stream["dataset"], columns=QUESTIONS)
    assert len(whole) == 4
    assert [image.name for record in found for image in record.images] == [r.images[0].name for r in whole[:3]]
    with pytest.raises(DataError, match="holds 4 records, and the config says 9"):
        records(tmp_path, **stream, records=9)


def test_text_alone_needs_no_picture_column(tmp_path: Path) -> None:
    table(3).save_to_disk(tmp_path / "saved")
    found = records(tmp_path, dataset=str(tmp_path / "saved"), columns={"question": "ask", "answer": "say"})
    assert [(record.id, record.images) for record in found] == [("0", ()), ("1", ()), ("2", ())]


def test_rows_have_the_faults_of_records(tmp_path: Path) -> None:
    whole = picture(3)
    whole.save(tmp_path / "3.png")
    stored = [(tmp_path / "3.png").read_bytes(), b"no picture", None, (tmp_path / "3.png").read_bytes()]
    columns = {"picture": stored, "ask": ["what", "what", "<image>what", "what"], "say": ["red", "red", "red", None],
               "name": list(range(4))}  # fmt: skip
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    data = {"dataset": str(tmp_path / "saved"), "columns": QUESTIONS}
    with pytest.raises(DataError, match="3 problems"):
        records(tmp_path, **data)
    (source,) = read_data(DataConfig(**data, on_fault="skip"), tmp_path / "data", seed=0)
    assert [record.id for record in source.records] == ["0"]
    assert {fault.id: fault.reason for fault in source.faults} == {"1": "image_broken", "2": "markers", "3": "format"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"columns": {**QUESTIONS, "answer": "sya"}}, "columns.answer: there is no column 'sya'; did you mean 'say'"),
        ({"split": "test"}, "no split 'test'"),
        ({"config": "small"}, "leave it out of a file"),
        ({"streaming": True, "records": 2}, "leave streaming out"),
        ({"dataset": "none"}, "datasets cannot read it"),
        ({"dataset": "notes.txt"}, "a '.txt' file is no table"),
        ({"dataset": "broken.json"}, "datasets cannot read it"),
        ({"dataset": "empty"}, "holds no record"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    table().save_to_disk(tmp_path / "saved")
    table().select([]).save_to_disk(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "broken.json").write_text("{oops")
    values = {"dataset": "saved", "columns": QUESTIONS, **data}
    with pytest.raises(DataError, match=said):
        records(tmp_path, **{**values, "dataset": str(tmp_path / values["dataset"])})
    assert not (tmp_path / "data" / STAGING).exists()


def test_a_split_of_several(tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"train": table(4), "test": table(2)})
    parts.save_to_disk(tmp_path / "saved")
    assert len(records(tmp_path, dataset=str(tmp_path / "saved"), columns=QUESTIONS, split="test")) == 2
    with pytest.raises(DataError, match="did you mean 'test'"):
        records(tmp_path, dataset=str(tmp_path / "saved"), columns=QUESTIONS, split="tset")


def test_training_from_a_table_ends_where_training_from_its_files_does(tmp_path: Path) -> None:
    table(4).save_to_disk(tmp_path / "saved")
    values = train_values(tmp_path, max_steps=2)
    values["stages"] = values["stages"][:1]
    data = DataConfig(dataset=str(tmp_path / "saved"), columns=QUESTIONS)
    values["stages"][0]["data"] = data.model_dump()
    train(TrainConfig.model_validate(values), tmp_path / "table")
    assert len(list((tmp_path / "table" / "data").rglob("pictures/*"))) == 4
    assert not (tmp_path / "table" / STAGING).exists()
    values["stages"][0]["data"] = {"path": on_disk(data, tmp_path / "files", seed=0).path}
    train(TrainConfig.model_validate(values), tmp_path / "file")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("table", "file"))
    assert all((one[key] == other[key]).all() for key in one)


def test_a_broken_table_destroys_no_old_output(tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=1)
    values["stages"] = values["stages"][:1]
    output = tmp_path / "out"
    train(TrainConfig.model_validate(values), output)
    before = sorted(output.rglob("*"))
    table(2, say=["red", None]).save_to_disk(tmp_path / "saved")
    values["stages"][0]["data"] = {"dataset": str(tmp_path / "saved"), "columns": QUESTIONS}
    schedule = TrainConfig.model_validate(values)
    with pytest.raises(OutputError, match="another config"):
        train(schedule, output)
    with pytest.raises(DataError, match="value"):
        train(schedule, output, overwrite=True)
    assert sorted(output.rglob("*")) == before
    with pytest.raises(DataError, match="value"):
        train(schedule, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    table(2).save_to_disk(tmp_path / "good")
    values["stages"][0]["data"]["dataset"] = str(tmp_path / "good")
    train(TrainConfig.model_validate(values), output, overwrite=True)
    assert (output / "model").is_dir() and not (output / STAGING).exists()


def test_what_a_kill_left_before_a_run_began_is_no_obstacle(tmp_path: Path) -> None:
    table(2).save_to_disk(tmp_path / "saved")
    values = train_values(tmp_path, max_steps=1)
    values["stages"] = values["stages"][:1]
    values["stages"][0]["data"] = {"dataset": str(tmp_path / "saved"), "columns": QUESTIONS}
    rest = tmp_path / "out" / STAGING / "dataset-of-another-run"
    rest.mkdir(parents=True)
    train(TrainConfig.model_validate(values), tmp_path / "out")
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1 and not (tmp_path / "out" / STAGING).exists()


def sources(*parts: dict[str, Any]) -> list[Source]:
    config = DataConfig(mixture=[{"path": f"{i}.json", **part} for i, part in enumerate(parts)])
    return [Source(part.title, part, 0, ()) for part in config.parts]


def test_weights_are_shares_of_as_many_records_as_there_are() -> None:
    items = [[f"a{i}" for i in range(8)], [f"b{i}" for i in range(4)]]
    few, many = mix(sources({"weight": 1}, {"weight": 2}), items, seed=0)
    assert (len(few), len(many)) == (4, 8)
    assert len(set(few)) == 4 and sorted(many) == sorted([*items[1], *items[1]])
    assert mix(sources({"weight": 1}, {"weight": 2}), items, seed=0) == [few, many]
    assert any(mix(sources({"weight": 1}, {"weight": 2}), items, seed=seed)[0] != few for seed in range(1, 9))
    assert shares(10, [1, 1, 1]) == [4, 3, 3] and shares(5, [0.1, 0.9]) == [1, 4]


def test_epochs_repeat_and_cut() -> None:
    items = [list(range(4)), list(range(10)), list(range(3))]
    repeated, half, once = mix(sources({"epochs": 2.5}, {"epochs": 0.5}, {}), items, seed=0)
    assert sorted(repeated)[:8] != sorted(repeated) and len(repeated) == 10
    assert all(repeated.count(item) in (2, 3) for item in range(4))
    assert len(half) == len(set(half)) == 5 and once == [0, 1, 2]
    with pytest.raises(DataError, match="none of its 3 records would be seen"):
        mix(sources({"epochs": 0.1}), [[1, 2, 3]], seed=0)


def test_a_mixture_trains_with_settings_of_each_part(tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=1)
    values["stages"] = values["stages"][:1]
    file = write_data(tmp_path / "more", 4)
    (tmp_path / "more" / "2.png").unlink()
    values["stages"][0]["data"] = {
        "mixture": [
            {"path": values["stages"][0]["data"]["path"], "epochs": 0.5},
            {"path": str(file), "on_fault": "skip", "epochs": 2},
            {"synthetic": "captions", "scenes": 3},
        ]
    }
    train(TrainConfig.model_validate(values), tmp_path / "out")
    reports = json.loads((tmp_path / "out" / "data_report.json").read_text())["01-projector"]
    assert [(r["read"], r["used"], r["samples"]) for r in reports] == [(8, 8, 4), (4, 3, 6), (3, 3, 3)]
    assert reports[1]["skipped"] == {"image_missing": 1} and reports[1]["records"][0]["id"] == "2"
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert TrainConfig.model_validate(resolved).stages == TrainConfig.model_validate(values).stages


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"mixture": []}, "mixture"),
        ({"path": "a", "mixture": [{"path": "b"}]}, "path, synthetic, dataset, mixture; give exactly one"),
        ({"mixture": [{"path": "a", "weight": 1}, {"path": "b"}]}, "give all of them one"),
        ({"mixture": [{"path": "a", "weight": 1, "epochs": 1}]}, "give one of them"),
        ({"mixture": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"mixture": [{"path": "a"}], "on_fault": "skip"}, "on_fault beside a mixture.*into its parts"),
        ({"mixture": [{"mixture": [{"path": "a"}]}]}, "unknown key 'mixture'"),
        ({"path": "a", "weight": 2}, "unknown key 'weight'"),
        ({"path": "a", "on_fault": "replace"}, "on_fault"),
        ({"path": "a", "max_length": 0}, "max_length"),
        ({"path": "a", "streaming": True}, "are a dataset's; leave them out"),
        ({"path": "a", "split": "val"}, "leave it out"),
        ({"dataset": "a"}, "dataset has no columns"),
        ({"dataset": "a", "columns": {"question": "q"}}, "columns name no text"),
        ({"dataset": "a", "columns": {"images": "i"}}, "columns name no text"),
        ({"dataset": "a", "columns": {"question": "q", "answer": "a", "conversations": "c"}}, "columns name no text"),
        ({"dataset": "a", "columns": {"conversations": "c"}, "streaming": True}, "add records"),
        ({"dataset": "a", "columns": {"conversations": "c"}, "image_root": "b"}, "columns name none"),
        ({"dataset": "a", "columns": {"conversations": "c"}, "scenes": 3}, "scenes says"),
        ({"synthetic": "questions", "scenes": 3, "split": "dev"}, "write one of train, val, test"),
        ({"synthetic": "questions", "scenes": 3, "records": 3}, "these are drawn; leave it out"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(DataConfig, data, source="test")


def test_paths_start_at_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    values = {"mixture": [{"path": "a.json", "image_root": "b"}, {"dataset": "saved"}, {"dataset": "org/name"}]}
    parts = absolute(DataConfig, values, tmp_path, lambda name, place: name)["mixture"]
    assert parts[0] == {"path": str(tmp_path / "a.json"), "image_root": str(tmp_path / "b")}
    assert [part["dataset"] for part in parts[1:]] == [str(tmp_path / "saved"), "org/name"]


def test_what_lies_on_disk_reads_as_a_file(tmp_path: Path) -> None:
    table(2).save_to_disk(tmp_path / "saved")
    data = DataConfig(dataset=str(tmp_path / "saved"), columns=QUESTIONS, on_fault="skip", records=2)
    again = on_disk(data, tmp_path / "data", seed=0)
    assert (again.on_fault, again.records, again.dataset, again.columns) == ("skip", 2, None, None)
    assert DataConfig.model_validate(again.model_dump()) == again
    assert load_records(str(again.path)) == records_of(data, tmp_path / "data", seed=0)
