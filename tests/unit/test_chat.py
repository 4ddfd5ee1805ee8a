"""Only answers are learnt, and what the labels hold reads back as the answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.data.chat import IGNORED, message, tokenise
from moe_vision.data.collate import Collator, ConversationDataset
from moe_vision.data.faults import RecordFault
from moe_vision.data.records import Record, Turn, load_records
from moe_vision.evaluation import prompt_text
from moe_vision.modeling import MoeVisionProcessor
from tests.tiny import tiny_model
from tests.unit.toy import write_data


@pytest.fixture(scope="module")
def processor() -> MoeVisionProcessor:
    return tiny_model()[1]


def conversation(*texts: str, images: int = 1) -> Record:
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Record("a", tuple(Path(f"{i}.png") for i in range(images)), turns)


def learnt(labels: list[int], processor: Any) -> list[str]:
    """Text of every unbroken stretch of labels."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [processor.tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_labels_are_the_answers_with_their_end(processor: MoeVisionProcessor) -> None:
    record = conversation("<image>\nwhat is this", "a red circle", "is this red", "zebra 42, été")
    result = tokenise(record, processor)
    end = processor.tokenizer.eos_token
    assert [text.strip() for text in learnt(result.labels, processor)] == [
        f"a red circle{end}",
        f"zebra 42, été{end}",
    ]
    assert result.input_ids.count(processor.image_token_id) == processor.num_image_tokens((64, 64))
    assert all(label in (IGNORED, token) for token, label in zip(result.input_ids, result.labels, strict=True))


def test_templates_without_marked_answers_give_the_same_labels(processor: MoeVisionProcessor) -> None:
    record = conversation("<image>\nwhat is this", "a red circle", "is this red", "zebra 42, été")
    marked = tokenise(record, processor)
    plain = tiny_model()[1]
    template = plain.tokenizer.chat_template
    plain.chat_template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert plain.chat_template != template
    assert tokenise(record, plain) == marked


def test_ids_are_the_processors_own(processor: MoeVisionProcessor) -> None:
    record = conversation("<image>\nwhat <image>is this", "a red circle", images=2)
    text = processor.apply_chat_template([message(turn) for turn in record.turns], tokenize=False)
    views = torch.zeros(3, 128, 128)
    expected = processor(text=[text], images=[views, views], do_rescale=False, add_special_tokens=False)["input_ids"][0]
    assert tokenise(record, processor).input_ids == list(expected)


def test_markers_become_image_parts() -> None:
    parts = message(Turn("user", "see <image>\nand <image>"))["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image"]
    assert parts[2]["text"] == "and "


def test_a_conversation_that_the_template_refuses_is_a_fault_of_its_record() -> None:
    processor = tiny_model()[1]
    own = processor.tokenizer.chat_template
    processor.chat_template = own + "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}"
    assert tokenise(conversation("yes", "red", images=0), processor)
    with pytest.raises(RecordFault, match=r"'a': the chat template refuses the conversation .never.: change its turns"):
        tokenise(conversation("no", "red", images=0), processor)


def test_batches_are_padded_on_the_right(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    records = load_records(write_data(tmp_path, 2))
    short = Record("text", (), (Turn("user", "what"), Turn("assistant", "red")))
    dataset = ConversationDataset([records[0], short, records[1]], processor)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(3)])
    assert batch["pixel_values"].shape == (2, 3, 128, 128)
    sizes = [len(dataset[i]["input_ids"]) for i in range(3)]
    assert batch["attention_mask"].sum(1).tolist() == sizes
    assert batch["attention_mask"][1, 0] == 1 and batch["attention_mask"][1, -1] == 0
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_logits_are_kept_where_a_row_learns_its_next_token(tmp_path: Path, processor: MoeVisionProcessor) -> None:
    model, _ = tiny_model()
    dataset = ConversationDataset(load_records(write_data(tmp_path, 3)), processor)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(3)])
    keep = batch.pop("logits_to_keep")
    learnt = (batch["labels"] != IGNORED).any(0).nonzero().flatten()
    assert keep.tolist() == (learnt - 1).tolist() and 0 < len(keep) < batch["input_ids"].shape[1]
    few, all_ = model(**batch, logits_to_keep=keep), model(**batch)
    assert few.logits.shape[1] == len(keep)
    torch.testing.assert_close(few.loss, all_.loss)
    few.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    all_.loss.backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "texts", [("what", "a</s>b"), ("what </s> is", "red"), ("what", "red", "<|assistant|>no", "x")]
)
def test_a_text_with_a_special_token_is_a_fault_of_its_record(
    texts: tuple[str, ...], processor: MoeVisionProcessor
) -> None:
    with pytest.raises(
        RecordFault, match=r"record 'a': its text contains '(</s>|<\|assistant\|>)', which is a special"
    ):
        tokenise(conversation(*texts, images=0), processor)


def test_a_question_with_a_special_token_is_refused(processor: MoeVisionProcessor) -> None:
    with pytest.raises(RecordFault, match="the question contains '</s>'"):
        prompt_text(processor, [Turn("user", "what </s> is it")], [])
