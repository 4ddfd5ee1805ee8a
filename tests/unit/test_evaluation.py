"""Scores are shares of exact matches; pictures that come twice are encoded once, and give the same answers."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import ANY, patch

import pytest
import torch
from typer.testing import CliRunner

from moe_vision.cli import app
from moe_vision.data.chat import message
from moe_vision.data.records import Record, load_image, load_records
from moe_vision.evaluation import answer, evaluate, generate
from moe_vision.modeling import MoeVisionProcessor
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


def long_data(folder: Path, words: int) -> Path:
    """Four records, of which the third has a question of so many words more."""
    path = write_data(folder, 4)
    values = json.loads(path.read_text())
    values[2]["conversations"][-2]["value"] += " which" * words
    path.write_text(json.dumps(values))
    return path


def longest(records: Sequence[Record], processor: MoeVisionProcessor) -> int:
    """Tokens of the longest question, by transformers' processor."""
    inputs = [
        processor.apply_chat_template(
            [message(turn) for turn in record.turns[:-1]], tokenize=False, add_generation_prompt=True
        )
        for record in records
    ]
    images = [[load_image(path) for path in record.images] for record in records]
    encoded = processor(text=inputs, images=images, padding=True, add_special_tokens=False, return_tensors="pt")
    return int(encoded["attention_mask"].sum(1).max())


def test_questions_beyond_the_context(tmp_path: Path) -> None:
    model, processor = tiny_model()
    path = long_data(tmp_path, 30)
    records = load_records(path)
    context = longest(records, processor) + 6
    model.config.text_config.max_position_embeddings = context
    assert evaluate(model, processor, records, max_new_tokens=6).count == 4  # exactly as many as fit
    with patch.object(model, "generate", side_effect=AssertionError("asked")):
        with pytest.raises(
            ValueError, match=rf"record {records[2].id!r}: .* {context - 6} tokens .* context of {context}"
        ):
            evaluate(model, processor, records, max_new_tokens=7)
        with pytest.raises(ValueError, match=rf"{context - 6} tokens .* 7 of the answer .* lower max_new_tokens"):
            generate(model, processor, [(records[2].turns[:-1], records[2].images)], 7)
    report = evaluate(model, processor, records, max_new_tokens=7, on_fault="skip")
    assert (report.count, [fault.reason for fault in report.skipped]) == (3, ["too_long"])
    assert [prediction.id for prediction in report.predictions] == [records[i].id for i in (0, 1, 3)]
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        evaluate(model, processor, records[2:3], max_new_tokens=7, on_fault="skip")


@pytest.mark.parametrize(
    ("said", "expected"),
    [("", "all 4 answers are empty.*end token"), (" ", "all 4 answers are empty"),
     ("blue", "every task scores 0.*'no' is expected and the answer is 'blue'.*max-new-tokens"), ("no", None)],
)  # fmt: skip
def test_results_that_point_to_a_fault(said: str, expected: str | None, tmp_path: Path) -> None:
    model, processor = tiny_model()
    records = load_records(write_data(tmp_path, 4))
    with patch("moe_vision.evaluation.generate", return_value=[said] * 4):
        warnings = evaluate(model, processor, records).warnings()
    assert len(warnings) == (expected is not None)
    assert expected is None or re.search(expected, warnings[0])


def test_the_commands_warn_on_standard_error(tmp_path: Path) -> None:
    model, processor = tiny_model()
    silent = model.config.text_config.eos_token_id
    with torch.no_grad():  # its end token comes first, whatever is asked
        model.model.language_model.norm.weight.zero_()
        model.model.language_model.norm.weight[0] = 1
        model.get_input_embeddings().weight[:, 0] = -1
        model.get_input_embeddings().weight[silent, 0] = 1
    model.model.language_model.layers[-1].register_forward_hook(lambda *given: given[-1].abs())
    path = long_data(tmp_path / "data", 600)
    with patch("moe_vision.evaluation.load", return_value=(model, processor)):
        run = partial(CliRunner().invoke, app)
        refused = run(["eval", str(tmp_path / "model"), str(path)])
        assert isinstance(refused.exception, ValueError) and "context of 512" in str(refused.exception)
        done = run(["eval", str(tmp_path / "model"), str(path), "--on-fault", "skip", "--json"])
        asked = run(["generate", str(tmp_path / "model"), "what", "--image", str(tmp_path / "data" / "0.png")])
    assert done.exit_code == asked.exit_code == 0
    assert json.loads(done.stdout) == {"average": 0.0, "by_task": ANY, "count": 3, "skipped": 1}
    assert "1 of 4 records are left out: too_long 1" in done.stderr and "all 3 answers are empty" in done.stderr
    assert "warning: the answer is empty" in asked.stderr


def test_one_question(tmp_path: Path) -> None:
    model, processor = tiny_model()
    write_data(tmp_path, 1)
    picture = [tmp_path / "0.png"]
    assert answer(model, processor, "what", picture, 4) == answer(model, processor, "<image>what", picture, 4)
    assert isinstance(answer(model, processor, "what", max_new_tokens=4), str)
    with pytest.raises(ValueError, match="2 <image> markers for 1 images"):
        answer(model, processor, "<image><image>what", picture, 4)
