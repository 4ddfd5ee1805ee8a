"""The generated pictures, and the recipes of the zoo that is trained on them."""

import json
import random
import re

import pytest
import torch
from PIL import Image

from moe_vision.data.records import load_records
from moe_vision.data.synthetic import TASKS, caption, make_scene, questions, render, scene_seed, write_split
from moe_vision.data.synthetic.scene import SPLITS, Blob, Chart, Label, Shape, Texture
from moe_vision.experts import EXPERTS
from moe_vision.experts.weights import load_expert_weights
from moe_vision.recipes.distillation import probes
from moe_vision.recipes.experts import pretrain
from moe_vision.recipes.language_model import WORDS
from moe_vision.recipes.pictures import Pictures
from moe_vision.recipes.rebuild import damaged, packaged_zoo, read_manifest, rebuild
from moe_vision.recipes.tokenizer import build_tokenizer

SCENES = [make_scene(scene_seed("val", index)) for index in range(200)]


def test_scenes_and_pictures_are_functions_of_their_seed():
    for seed in (0, 7, 12345):
        assert make_scene(seed) == make_scene(seed)
        assert render(make_scene(seed)).tobytes() == render(make_scene(seed)).tobytes()
        assert questions(make_scene(seed)) == questions(make_scene(seed))
    assert render(make_scene(1)).tobytes() != render(make_scene(2)).tobytes()


def test_no_scene_is_in_two_splits_nor_of_two_seeds():
    drawn = [
        scene_seed(split, index, seed) for split in SPLITS for seed in (0, 1, 20, 99) for index in (0, 1, 5_000, 99_999)
    ]
    assert len(set(drawn)) == len(drawn)
    last = {split: scene_seed(split, 99_999, 99) for split in SPLITS}
    first = {split: scene_seed(split, 0, 0) for split in SPLITS}
    assert last["train"] < first["val"] and last["val"] < first["test"]


@pytest.mark.parametrize(("index", "seed"), [(0, 100), (10_000_000, 0), (-1, 0)])
def test_a_seed_beyond_its_split_is_refused(index, seed):
    with pytest.raises(ValueError, match="below 100,000"):
        scene_seed("train", index, seed)


def test_pictures_have_the_size_that_the_experts_expect():
    picture = render(SCENES[0])
    assert picture.size == (128, 128) and picture.mode == "RGB"


def test_every_question_has_one_right_answer_in_the_scene():
    for scene in SCENES:
        answers = {pair.task: pair for pair in questions(scene)}
        assert tuple(answers) == TASKS
        kinds = [item.shape for item in scene.shapes.values()]
        assert len(set(kinds)) == len(kinds) == int(answers["count"].answer)
        assert answers["ocr"].answer == scene.only(Label).digits
        place = answers["where"].answer
        item = scene.cells["abcd".index(place[0]), int(place[1]) - 1]
        assert isinstance(item, Shape) and answers["where"].question == f"where is {item.shape}"
        assert answers["colour"].answer == item.colour
        values = {
            value: str(scene.only(kind)) for value, kind in (("chart", Chart), ("texture", Texture), ("area", Blob))
        }
        bar = answers["chart"].question.split()[-1]
        heights = dict(zip(("red", "green", "blue"), re.findall(r"\d", values["chart"]), strict=True))
        assert answers["chart"].question == f"value of bar {bar}" and answers["chart"].answer == heights[bar]
        assert values["texture"] == f"Texture(name='{answers['texture'].answer}')"
        assert values["area"] == f"Blob(size={answers['area'].answer})"


def test_relations_hold_between_the_two_shapes_that_are_named():
    smaller = {"left": True, "right": False, "above": True, "below": False}
    for scene in SCENES:
        pair = next(pair for pair in questions(scene) if pair.task == "relation")
        subject, _, noun = pair.question.split()
        cells = {item.shape: cell for cell, item in scene.shapes.items()}
        axis = 1 if pair.answer in ("left", "right") else 0
        assert (cells[subject][axis] < cells[noun][axis]) == smaller[pair.answer]


def test_answers_leave_no_majority_to_guess():
    share = {}
    for task in TASKS:
        answers = [pair.answer for scene in SCENES for pair in questions(scene) if pair.task == task]
        share[task] = max(map(answers.count, set(answers))) / len(answers)
    assert max(share.values()) < 0.4, share


def test_captions_name_every_cell_in_reading_order():
    names = re.findall(r"\b[abcd][1-4]\b", caption(SCENES[0]))
    assert names == [row + column for row in "abcd" for column in "1234"]


def test_written_splits_are_records_that_training_reads(tmp_path):
    train = write_split(tmp_path, "train", 3, seed=5)
    test = write_split(tmp_path, "test", 2, seed=5)
    captions, asked = load_records(train["captions"]), load_records(train["questions"])
    assert [len(captions), len(asked)] == [3, 3]
    assert [len(record.turns) for record in asked] == [16, 16, 16]
    assert asked[0].turns[0].text.startswith("<image>\n")
    assert all("<image>" not in turn.text for turn in asked[0].turns[1:])
    tested = load_records(test["questions"])
    assert [record.task for record in tested] == [*TASKS, *TASKS]
    values = json.loads(train["captions"].read_text())
    with Image.open(tmp_path / values[0]["image"]) as picture:
        assert picture.tobytes() == render(make_scene(scene_seed("train", 0, 5))).tobytes()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORDS)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("read label", "Grüße, 42 🙂\n\ttabs", "中文 и русский", "a" * 50):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).removeprefix(" ") == text
        assert tokenizer.unk_token_id is None


def test_words_and_digits_are_one_token_each(tokenizer):
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    text = caption(SCENES[1])
    letters = len(re.findall(r"[a-z]+|\d", text))
    # A space before a digit is a token of its own, so that every digit is the same token wherever it stands.
    spaces = len(re.findall(r" \d", text))
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == letters + spaces


def test_the_chat_template_prints_one_form_for_every_way_to_write_a_message(tokenizer):
    wanted = "<s><|user|><image>read label<|assistant|>472</s><|user|>how many shapes<|assistant|>"
    for first in ("<image>\nread label", "<image>read label",
                  [{"type": "image"}, {"type": "text", "text": "read label"}]):  # fmt: skip
        messages = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": "472"},
            {"role": "user", "content": "how many shapes"},
        ]
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == wanted


def test_the_template_marks_answers_with_their_end(tokenizer):
    messages = [{"role": "user", "content": "<image>read label"}, {"role": "assistant", "content": "472"}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    answer = [token for token, mine in pairs if mine]
    assert tokenizer.decode(answer).split() == ["472</s>"] and answer[-1] == tokenizer.eos_token_id


def test_the_packaged_weights_are_those_of_the_manifest():
    zoo = packaged_zoo()
    manifest = read_manifest(zoo)
    experts = {"clip", "convnext", "sam", "eva02", "pix2struct", "siglip", "dinov3", "radio"}
    assert set(manifest) == {*experts, "language_model"}
    assert damaged(zoo) == []
    assert sum(path.stat().st_size for path in zoo.rglob("*.safetensors")) < 6_000_000


def test_a_rebuilt_expert_is_the_same_for_the_same_seed(tmp_path):
    made = [rebuild(["sam"], tmp_path / name, seed=seed, step_scale=0.001)["sam"]["sha256"]
            for name, seed in (("one", 3), ("two", 3), ("other", 4))]  # fmt: skip
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("name", ["siglip", "dinov3", "radio"])
def test_a_recipe_without_cell_labels_repeats_with_its_seed(name: str, tmp_path) -> None:
    pictures = Pictures("train", 24, 5)
    metrics = [pretrain(name, tmp_path / run, pictures, pictures, seed=seed, steps=4)
               for run, seed in (("one", 3), ("two", 3), ("other", 4))]  # fmt: skip
    files = [(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("one", "two", "other")]
    assert files[0] == files[1] != files[2] and metrics[0] == metrics[1]
    measured = read_manifest(packaged_zoo())[name]["held_out"]
    assert measured.keys() == metrics[0]["held_out"].keys()


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip", "dinov3", "radio"])
def test_what_an_expert_learnt_without_cell_labels_can_be_read_from_its_map(name: str) -> None:
    pictures, accuracy = Pictures("test", 128, 5), []
    for pretrained in ("default", None):
        torch.manual_seed(0)
        expert = EXPERTS[name](variant="micro", pretrained=pretrained).build().eval()
        if pretrained is not None:
            load_expert_weights(expert, pretrained)
        accuracy.append(probes(expert, pictures, torch.arange(128)))
    trained, untrained = accuracy
    assert trained["probe_kind"] > 0.9 and trained["probe_kind"] > untrained["probe_kind"]
    assert trained["probe_colour"] > untrained["probe_colour"] + 0.1


def test_an_unknown_member_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'eva02'"):
        rebuild(["eva2"], tmp_path)


def test_questions_of_another_draw_differ():
    scene = SCENES[2]
    drawn = {tuple(pair.question for pair in questions(scene, random.Random(i))) for i in range(20)}
    assert len(drawn) > 5
