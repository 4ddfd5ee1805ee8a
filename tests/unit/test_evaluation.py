"""Scores are shares of exact matches; pictures that come twice are encoded once, and give the same answers."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from moe_vision.data.chat import message
from moe_vision.data.records import load_image, load_records
from moe_vision.evaluation import answer, evaluate, generate
from tests.tiny import tiny_model
from tests.unit.toy import write_data


def test_scores_by_task(tmp_path: Path) -> None:
    model, processor = tiny_model()
    records = load_records(write_data(tmp_path, 4))
    said = ["no", " no ", "yes", "yes"]  # right: no, no, no, yes
    with patch("moe_vision.evaluation.generate", return_value=said):
        report = evaluate(model, processor, records)
    assert report.by_task == {"light": 0.5, "dark": 1.0}
    assert (report.average, report.count) == (0.75, 4)
    assert json.loads(json.dumps(report.to_dict()))["predictions"][0]["prediction"] == "no"


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no record"):
        evaluate(*tiny_model(), [])


def test_answers_are_those_of_generate_one_by_one(tmp_path: Path) -> None:
    model, processor = tiny_model()
    records = load_records(write_data(tmp_path, 3))
    prompts = [(record.turns[:n], record.images) for record in records for n in (1, 3)]
    with patch.object(model.model.vision_tower, "forward", wraps=model.model.vision_tower.forward) as tower:
        together = generate(model, processor, prompts, 6)
    assert [len(call.args[0]) for call in tower.call_args_list] == [3]  # six questions, three pictures
    for (turns, images), found in zip(prompts, together, strict=True):
        text = processor.apply_chat_template(
            [message(turn) for turn in turns], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[load_image(images[0])], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found == alone[0]


def test_one_question(tmp_path: Path) -> None:
    model, processor = tiny_model()
    write_data(tmp_path, 1)
    picture = [tmp_path / "0.png"]
    assert answer(model, processor, "what", picture, 4) == answer(model, processor, "<image>what", picture, 4)
    assert isinstance(answer(model, processor, "what", max_new_tokens=4), str)
    with pytest.raises(ValueError, match="2 <image> markers for 1 images"):
        answer(model, processor, "<image><image>what", picture, 4)
