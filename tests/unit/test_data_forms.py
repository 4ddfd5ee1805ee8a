"""Every form of data that people have is read as the LLaVA form of it, or is one fault with a hint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from jinja2.exceptions import TemplateError
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from moe_vision.data import samples as samples_module
from moe_vision.data.chat import message, tokenise
from moe_vision.data.config import DataConfig
from moe_vision.data.faults import DataError
from moe_vision.data.records import Record, load_records, read_records
from moe_vision.data.samples import samples_of
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.training.data import read_data, records_of
from tests.tiny import tiny_model

CASES = Path(__file__).parents[1] / "cases"
ASK, SAY = "what is it", "a dog"
LLAVA = [{"from": "human", "value": f"<image>\n{ASK}"}, {"from": "gpt", "value": SAY}]
BARE = [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]
MORE = [{"from": "human", "value": "and"}, {"from": "gpt", "value": "a cat"}]
CHAT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]


def part(kind: str, **values: Any) -> dict[str, Any]:
    return {"type": kind, **values}


def parts(*content: dict[str, Any]) -> list[dict[str, Any]]:
    """A question of parts, and its answer."""
    answer = {"role": "assistant", "content": [part("text", text=SAY)]}
    return [{"role": "user", "content": [*content, part("text", text=ASK)]}, answer]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "p.png"):
        Image.new("RGB", (4, 3), "red").save(tmp_path / name)
    return tmp_path


def read(folder: Path, *values: Any) -> list[Record]:
    (folder / "data.json").write_text(json.dumps(list(values)))
    return load_records(folder / "data.json")


def meant(record: Record) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of a record's images, and its turns."""
    return [path.name for path in record.images], [(turn.role, turn.text) for turn in record.turns]


ONE = (["a.png"], [("user", f"<image>\n{ASK}"), ("assistant", SAY)])
TWO = (["a.png", "b.png"], [("user", f"<image>\n<image>\n{ASK}"), ("assistant", SAY)])
TEXT = ([], [("user", ASK), ("assistant", SAY)])
READ: dict[str, tuple[dict[str, Any], Any]] = {
    "LLaVA": ({"image": "a.png", "conversations": LLAVA}, ONE),
    "a list of one": ({"image": ["a.png"], "conversations": LLAVA}, ONE),
    "images": ({"images": ["a.png"], "conversations": LLAVA}, ONE),
    "images, a path": ({"images": "a.png", "conversations": LLAVA}, ONE),
    "image_path": ({"image_path": "a.png", "conversations": LLAVA}, ONE),
    "image_paths": ({"image_paths": ["a.png"], "messages": CHAT}, ONE),
    "two keys that agree": ({"image": "a.png", "images": ["a.png"], "conversations": LLAVA}, ONE),
    "one key is empty": ({"image": None, "images": ["a.png"], "conversations": LLAVA}, ONE),
    "an object with a path": ({"image": {"path": "a.png", "bytes": None}, "conversations": LLAVA}, ONE),
    "null": ({"image": None, "conversations": BARE}, TEXT),
    "an empty path": ({"image": "", "conversations": BARE}, TEXT),
    "no images": ({"image": [], "images": None, "conversations": BARE}, TEXT),
    "a list of null": ({"images": [None], "conversations": BARE}, TEXT),
    "no marker": ({"image": "a.png", "conversations": BARE}, ONE),
    "no marker, two images of one question": ({"image": ["a.png", "b.png"], "conversations": BARE}, TWO),
    "no marker, one image of two questions": (
        {"image": "a.png", "conversations": [*BARE, *MORE]},
        (ONE[0], [*ONE[1], ("user", "and"), ("assistant", "a cat")]),
    ),
    "messages": ({"image": "a.png", "messages": CHAT}, ONE),
    "from and content": (
        {"image": "a.png", "messages": [{"from": "user", "content": ASK}, {"from": "gpt", "content": SAY}]}, ONE,
    ),
    "question and answer": ({"image": "a.png", "question": ASK, "answer": SAY}, ONE),
    "prompt and completion": ({"prompt": ASK, "completion": SAY}, TEXT),
    "prompt and completion of messages": ({"images": ["a.png"], "prompt": CHAT[:1], "completion": CHAT[1:]}, ONE),
    "parts with a path": ({"messages": parts(part("image", image="a.png"))}, ONE),
    "parts of another name": ({"messages": parts(part("image", path="a.png"))}, ONE),
    "parts of OpenAI": ({"messages": parts(part("image_url", image_url={"url": "a.png"}))}, ONE),
    "parts of a table": ({"messages": parts(part("image", image="a.png", text=None))}, ONE),
    "parts without a path": ({"images": ["a.png"], "messages": parts(part("image"))}, ONE),
    "parts in order": (
        {"images": ["a.png", "b.png"], "messages": parts(part("image"), part("image"))},
        (TWO[0], [("user", f"<image><image>\n{ASK}"), ("assistant", SAY)]),
    ),
    "parts with and without": (
        {"images": ["b.png"], "messages": parts(part("image", image="a.png"), part("image"))},
        (TWO[0], [("user", f"<image><image>\n{ASK}"), ("assistant", SAY)]),
    ),
    "text before an image": (
        {"messages": [{"role": "user", "content": [part("text", text="see "), part("image", image="a.png")]}, CHAT[1]]},
        (["a.png"], [("user", "see <image>"), ("assistant", SAY)]),
    ),
    "the same in parts and beside them": (
        {"images": ["a.png"], "messages": parts(part("image", image="a.png"))}, ONE,
    ),
    "a greeting": ({"image": "a.png", "conversations": [{"from": "gpt", "value": "Hello!"}, *LLAVA]}, ONE),
    "a greeting after a system turn": (
        {"messages": [{"role": "system", "content": "be"}, {"role": "assistant", "content": "Hello!"}, *CHAT]},
        ([], [("system", "be"), *TEXT[1]]),
    ),
    "where it is from": ({"image": "a.png", "image_url": "http://x/y/a.png", "conversations": LLAVA}, ONE),
    "numbers about images": ({"image": "a.png", "num_images": 1, "image_id": 7, "conversations": LLAVA}, ONE),
    "task null": ({"image": "a.png", "task": None, "id": None, "conversations": LLAVA}, ONE),
}  # fmt: skip


@pytest.mark.parametrize("form", list(READ))
def test_a_form_is_read_as_llava_would_write_it(folder: Path, form: str) -> None:
    value, expected = READ[form]
    (record,) = read(folder, value)
    assert meant(record) == expected
    lines = folder / "lines.jsonl"
    lines.write_text(json.dumps(value) + "\n" + json.dumps(value))
    assert [meant(r) for r in load_records(lines)] == [expected] * 2


OURS = ("greeting", "OpenAI", "another name", "beside", "image_paths", "from and")
TRL_FORMS = [form for form in READ if "messages" in READ[form][0] and not any(word in form for word in OURS)]


@pytest.mark.parametrize("form", TRL_FORMS)
def test_turns_are_those_that_trl_makes(folder: Path, form: str) -> None:
    value = READ[form][0]
    listed = value.get("images", value.get("image", []))
    listed = [listed] if isinstance(listed, str) else listed
    (record,) = read(folder, value)
    expected = [
        {
            "role": turn["role"],
            "content": [{k: own for k, own in p.items() if own is not None} for p in turn["content"]],
        }
        for turn in prepare_multimodal_messages(value["messages"], list(listed))
    ]
    images = [p["image"] for turn in expected for p in turn["content"] if p["type"] == "image"]
    assert [path.name for path in record.images] == images
    for turn in expected:
        turn["content"] = [{"type": "image"} if p["type"] == "image" else p for p in turn["content"]]
    found = [message(turn) for turn in record.turns]
    for turn in found:
        if isinstance(turn["content"], str):
            turn["content"] = [part("text", text=turn["content"])]
    assert found == expected


FAULTS: dict[str, tuple[Any, str]] = {
    "video": ({"video": "a.mp4", "conversations": BARE}, "'video' is 'a.mp4': video and audio are not supported yet"),
    "videos": ({"videos": ["a.mp4"], "messages": CHAT}, "'videos' .* not supported yet"),
    "a video in a part": ({"messages": parts(part("video", video="a.mp4"))}, "is video, which is not supported yet"),
    "audio": ({"audio": {"path": "a.wav"}, "messages": CHAT}, "'audio' .* not supported yet"),
    "img": ({"img": "a.png", "conversations": BARE}, "'img' is 'a.png' and would be ignored; name images in 'image'"),
    "Image": ({"Image": "a.png", "conversations": BARE}, "'Image' .* would be ignored"),
    "image2": ({"image": "a.png", "image2": "b.png", "conversations": LLAVA}, "'image2' .* would be ignored"),
    "file_name": ({"file_name": "a.jpg", "conversations": BARE}, "'file_name' .* would be ignored"),
    "left": ({"left": "x/a.PNG", "image": "b.png", "conversations": LLAVA}, "'left' .* would be ignored"),
    "frames": ({"frames": ["a.png", "b.png"], "conversations": BARE}, "'frames' .* would be ignored"),
    "images of a turn": ({"messages": [{**CHAT[0], "images": ["a.png"]}, CHAT[1]]}, "'images' .* would be ignored"),
    "both turns": ({"messages": CHAT, "conversations": BARE}, "both 'conversations' and 'messages'"),
    "both images": ({"image": "a.png", "images": ["b.png"], "messages": CHAT}, "'image' and 'images' name different"),
    "an address": ({"image": "http://x/a.png", "conversations": LLAVA}, "not a path; save the image as a file"),
    "content": ({"image": "data:image/png;base64,iVBO", "conversations": LLAVA}, "not a path; save the image"),
    "long content": ({"image": "iVBO" * 9000, "conversations": LLAVA}, "not a path; save the image"),
    "half empty": ({"image": ["a.png", None], "conversations": LLAVA}, "with None; write a path or a list of paths"),
    "not a number": ({"image": float("nan"), "conversations": BARE}, "'image' is nan"),
    "parts without images": ({"messages": parts(part("image"))}, "1 image parts have no path, and the record lists 0"),
    "too few parts": ({"images": ["a.png", "b.png"], "messages": parts(part("image"))}, "lists 2 images"),
    "a part and a marker": (
        {"messages": parts(part("image", image="a.png"), part("text", text="<image>"))}, "1 images and 2 <image>",
    ),
    "a part of two images": ({"messages": parts(part("image", image="a.png", path="b.png"))}, "names no path"),
    "an image in text": ({"messages": parts(part("text", text="x", image="a.png"))}, "would be ignored"),
    "an unknown part": ({"messages": parts(part("table", table=[1]))}, "is not {type: text"),
    "parts of text": ({"messages": [{"role": "user", "content": ["hi"]}, CHAT[1]]}, "is not {type: text"),
    "content null": ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "is not {from: human"),
    "a tool": ({"messages": [CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]]}, "is not {from: human"),
    "no marker, which question": ({"image": ["a.png", "b.png"], "conversations": [*BARE, *MORE]}, "2 images and 0"),
    "only a greeting": ({"conversations": BARE[1:]}, r"turns go \[\]; they must alternate"),
    "two greetings": ({"conversations": [BARE[1], *BARE[1:], *BARE]}, "must alternate"),
    "an image in an answer": ({"image": "a.png", "conversations": [LLAVA[0], {"from": "gpt", "value": "<image>"}]},
                              "an answer has an <image>"),
    "answer null": ({"question": ASK, "answer": None}, "the value of 'answer' is None; write a text"),
    "no text": ({"image": "a.png", "caption": "x"}, r"no list 'conversations' .* \(keys: 'image', 'caption'"),
    "surrogate": ({"messages": [{"role": "user", "content": "x \ud800"}, CHAT[1]]}, r"'\\ud800', half of a character"),
    "surrogate in a key": ({"\ud800": 1}, "no list 'conversations'"),
    "surrogate in a path": ({"image": "\udcff.png", "conversations": LLAVA}, "half of a character"),
    "surrogate in an id": ({"id": "\ud800", "conversations": BARE}, "half of a character"),
    "a zero byte": ({"image": "a\0.png", "conversations": LLAVA}, "zero|null byte|no path of a file"),
    "a long path": ({"image": "x" * 300 + ".png", "conversations": LLAVA}, "no path of a file .*too long"),
    "a folder": ({"image": ".", "conversations": LLAVA}, "is a folder, not a file"),
    "a list": ([1], "is a list"),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FAULTS))
def test_what_is_not_plain_is_one_fault_with_a_hint(folder: Path, form: str) -> None:
    value, said = FAULTS[form]
    good = {"id": "good", "image": "a.png", "conversations": LLAVA}
    with pytest.raises(DataError, match=said) as caught:
        read(folder, good, value)
    assert "1 problem\n" in str(caught.value)
    str(caught.value).encode()  # can be printed
    assert len(str(caught.value)) < 1500
    records, faults = read_records(folder / "data.json", folder)
    assert [record.id for record in records] == ["good"] and len(faults) == 1
    json.dumps([faults[0].id, faults[0].problem])


GOOD = {"id": "1", "image": "a.png", "conversations": LLAVA}
OTHER = {"id": "2", "image": "a.png", "conversations": LLAVA}
TWO_RECORDS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "byte order mark": ("d.json", lambda v: b"\xef\xbb\xbf" + json.dumps(v).encode()),
    "byte order mark of lines": ("d.jsonl", lambda v: b"\xef\xbb\xbf" + b"\n".join(json.dumps(o).encode() for o in v)),
    "UTF-16": ("d.json", lambda v: json.dumps(v, ensure_ascii=False).encode("utf-16")),
    "UTF-32": ("d.json", lambda v: json.dumps(v).encode("utf-32")),
    "lines named .json": ("d.json", lambda v: "\n".join(map(json.dumps, v)).encode()),
    "lines of Windows": ("d.json", lambda v: "\r\n".join(map(json.dumps, v)).encode()),
    "lines of an old Mac": ("d.jsonl", lambda v: "\r".join(map(json.dumps, v)).encode()),
    "lines with gaps": ("d.jsonl", lambda v: ("\n\n" + "\n \n".join(map(json.dumps, v)) + "\n\n").encode()),
    "a list named .jsonl": ("d.jsonl", lambda v: json.dumps(v).encode()),
    "a long list named .jsonl": ("d.jsonl", lambda v: json.dumps(v, indent=2).encode()),
    "lines of another name": ("d.ndjson", lambda v: "\n".join(map(json.dumps, v)).encode()),
    "data": ("d.json", lambda v: json.dumps({"data": v}).encode()),
    "data with a version": ("d.json", lambda v: json.dumps({"version": "1", "n": [1], "records": v}).encode()),
    "data beside other lists": ("d.json", lambda v: json.dumps({"licenses": [{"a": 1}], "train": v}).encode()),
}


@pytest.mark.parametrize("form", list(TWO_RECORDS))
def test_a_file_is_read_by_what_it_holds(folder: Path, form: str) -> None:
    name, write = TWO_RECORDS[form]
    (folder / name).write_bytes(write([GOOD, OTHER]))
    assert [(record.id, meant(record)) for record in load_records(folder / name)] == [("1", ONE), ("2", ONE)]


def test_a_file_of_one_record(folder: Path) -> None:
    for name in ("one.json", "one.jsonl"):
        (folder / name).write_text(json.dumps(GOOD))
        assert [record.id for record in load_records(folder / name)] == ["1"]


WHOLE: dict[str, tuple[str, str]] = {
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep record": ('[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", "nested too deeply"),
    "a number": ("3", "holds a JSON int, not a list"),
    "null": ("null", "holds a JSON NoneType, not a list"),
    "a text": ('"x"', "holds a JSON str, not a list"),
    "two splits": (json.dumps({"train": [GOOD], "test": [OTHER]}), "keys 'train', 'test'.*keep one list"),
    "no list": (json.dumps({"data": {"train": 3}}), "not a list of LLaVA records"),
    "empty list": (json.dumps({"data": []}), "holds no record"),
    "digits": ('[{"id": ' + "9" * 5000 + "}]", "is not JSON .*digits"),
    "binary": ("\0\1", "is not JSON"),
}


@pytest.mark.parametrize("form", list(WHOLE))
def test_a_file_that_holds_no_records_is_named(folder: Path, form: str) -> None:
    text, said = WHOLE[form]
    (folder / "data.json").write_text(text)
    with pytest.raises(DataError, match=rf"data\.json: 1 problem\n.*{said}"):
        load_records(folder / "data.json")


def test_a_pipe_or_folder_of_data_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(DataError, match="is a folder, pipe or device"):
            load_records(path)
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot be read .*UTF-8"):
        load_records(tmp_path / "latin.json")


def test_lines_that_are_no_json_are_faults_of_their_own(folder: Path) -> None:
    bad = ["{oops", "[" * 100_000, '{"id": ' + "9" * 5000 + "}", '{"id": "r", "image": "a.png", "image": "b.png"}']
    for name in ("d.jsonl", "d.json"):
        (folder / name).write_text("\n".join([json.dumps(GOOD), *bad, json.dumps(OTHER)]))
        records, faults = read_records(folder / name, folder)
        assert [record.id for record in records] == ["1", "2"]
        assert [fault.id for fault in faults] == ["line 2", "line 3", "line 4", "r"]
        assert "'image' is there more than once" in faults[3].problem


def test_a_key_that_is_repeated_anywhere_in_a_record_is_a_fault(folder: Path) -> None:
    turn = '{"from": "human", "value": "a", "value": "b"}'
    (folder / "data.json").write_text(f'[{{"conversations": [{turn}, {json.dumps(BARE[1])}]}}]')
    with pytest.raises(DataError, match="the key 'value' is there more than once"):
        load_records(folder / "data.json")


@pytest.mark.parametrize("case", ["images_key", "image_null", "bom", "lines_named", "content_parts"])
def test_shared_cases_are_read(case: str, folder: Path) -> None:
    shutil.copy(CASES / f"{case}.json", folder)
    for record in load_records(folder / f"{case}.json"):
        markers = sum(turn.text.count("<image>") for turn in record.turns)
        assert markers == len(record.images) == ("hello" not in record.turns[0].text)


@pytest.fixture(scope="module")
def processor() -> MoeVisionProcessor:
    return tiny_model()[1]


def test_a_record_that_anything_refuses_is_skipped_with_id_and_reason(
    folder: Path, processor: MoeVisionProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: dict[str, Exception] = {
        "template": TemplateError("roles must alternate"), "tokenizer": TypeError("TextEncodeInput must be str"),
        "stop": StopIteration(), "memory": MemoryError(), "text": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "bad"),
    }  # fmt: skip

    def fussy(record: Record, processor: MoeVisionProcessor) -> Any:
        if record.id in errors:
            raise errors[record.id]
        return tokenise(record, processor)

    def broken(image: Image.Image, *_: Any, **__: Any) -> Image.Image:
        if image.size == (5, 5):
            raise ZeroDivisionError
        return image

    Image.new("RGB", (5, 5)).save(folder / "odd.png")
    monkeypatch.setattr(samples_module, "tokenise", fussy)
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    images = {"good": "a.png", "odd": "odd.png", "long": "x" * 300}
    values = [{"id": id, "image": image, "conversations": LLAVA} for id, image in images.items()]
    values += [{"id": id, "conversations": BARE} for id in errors]
    (folder / "data.json").write_text(json.dumps(values))

    def samples(**data: Any) -> Any:
        data = {"path": str(folder / "data.json"), **data}
        return samples_of(read_data(DataConfig(**data), folder, seed=0), processor, None, seed=0)

    left = samples(on_fault="skip")
    assert [record.id for record in left.records] == ["good"]
    reasons = {fault.id: fault.reason for fault in left.reports[0].skipped}
    assert reasons == {"odd": "image_broken", "long": "image_missing", **dict.fromkeys(errors, "text")}
    assert all(record["problem"] for record in left.reports[0].to_dict()["records"])
    values = [value for value in values if value["id"] in ("good", *errors)]
    (folder / "data.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="5 problems") as caught:
        samples()
    assert all(f"record '{id}': the chat template or tokenizer" in str(caught.value) for id in errors)


def test_tables_are_read_as_files_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts with images in the table, parts that stand for the images column, and no markers at all."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    red, blue = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    image_part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": datasets.List(image_part)}
    own = [
        {"role": "user", "content": [part("image", image=red, text=None), part("text", text=ASK, image=None)]},
        {"role": "assistant", "content": [part("text", text=SAY, image=None)]},
    ]
    features = datasets.Features({"messages": datasets.List(turn)})
    datasets.Dataset.from_dict({"messages": [own]}, features=features).save_to_disk(folder / "own")
    (record,) = records_of(DataConfig(dataset=str(folder / "own"), columns={"conversations": "messages"}), folder, 0)
    assert len(record.images) == 1 and meant(record)[1] == ONE[1]
    with Image.open(record.images[0]) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)

    for turns, expected in ((CHAT, TWO[1]), (parts(part("image"), part("image")), READ["parts in order"][1][1])):
        table = datasets.Dataset.from_dict({"images": [[red, blue]], "messages": [turns]})
        target = folder / f"listed-{len(expected[0][1])}"
        table.save_to_disk(target)
        columns = {"conversations": "messages", "images": "images"}
        (record,) = records_of(DataConfig(dataset=str(target), columns=columns), folder, 0)
        assert len(record.images) == 2 and meant(record)[1] == expected

    table = datasets.Dataset.from_dict({"images": [[None], None], "ask": [ASK] * 2, "say": [SAY] * 2})
    table.save_to_disk(folder / "none")
    columns = {"question": "ask", "answer": "say", "images": "images"}
    found = records_of(DataConfig(dataset=str(folder / "none"), columns=columns), folder, 0)
    assert [meant(record) for record in found] == [TEXT] * 2


def test_a_fatal_fault_of_an_image_names_its_records(folder: Path) -> None:
    values = [{"id": id, "image": "none.png", "conversations": LLAVA} for id in ("x", "y", "z")]
    with pytest.raises(DataError, match=r"1 problem\n  image '.*none\.png': no such file.* \[record 'x' and 2 more\]"):
        read(folder, *values)
