"""Every chat template prints texts and images once and in order, and exactly the answers are learnt."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken

from moe_vision.config import load_config, validate
from moe_vision.data.chat import IGNORED, message, render, tokenise
from moe_vision.data.faults import RecordFault
from moe_vision.data.records import Record, Turn
from moe_vision.evaluation import prompt_text
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.modeling.chat_rendering import end_of_turn_ids, render_chat
from moe_vision.modeling.chat_template import usable_template
from moe_vision.modeling.compose import chat_template_of, make_processor
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.modeling.turns import question_mask, turns_of
from tests.language_tokenizers import KINDS, OURS, TRL, marks, small_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer, tiny_values

ALL = [*((name, kind) for name in OURS for kind in KINDS), *((n, KINDS[i // 2 % 4]) for i, n in enumerate(TRL))]


def turns(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    spoken = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return tuple([] if system is None else [Turn("system", system)]) + tuple(spoken)


CONVERSATIONS = {
    "one turn": turns("<image>\nwhat is it?", "yes"),
    "several turns": turns("<image>\nwhat is it?", "a red circle", "is it 4?", "42", "and?", "zebra, été"),
    "system": turns("<image>\nwhat is it?", "no", "which colour", "red", system="You are kind."),
    "text only": turns("how many", "two squares"),
    "two images": turns("see <image>\nand <image>\nwhich one?", "2"),
    "image in a later turn": turns("is it a dog", "yes", "<image>\nwhat is it", "cat"),
}


def record(spoken: tuple[Turn, ...]) -> Record:
    return Record("r", tuple(Path(f"{i}.png") for i in range(sum(t.text.count("<image>") for t in spoken))), spoken)


@cache
def processor_of(name: str, kind: str, begins: bool = True, marked: bool = True) -> MoeVisionProcessor:
    template = OURS.get(name) or TRL[name]
    tokenizer = small_tokenizer(kind, marks(template) if marked else (), begins)
    images: Any = tiny_model(("clip",))[1].image_processor
    return MoeVisionProcessor(images, tokenizer, usable_template(tokenizer, template, name))


def stretches(labels: list[int]) -> list[tuple[int, list[int]]]:
    """Start and ids of every unbroken stretch of labels."""
    found: list[tuple[int, list[int]]] = []
    for place, label in enumerate(labels):
        if label != IGNORED and place and labels[place - 1] != IGNORED:
            found[-1][1].append(label)
        elif label != IGNORED:
            found.append((place, [label]))
    return found


def ids_of(processor: Any, text: str, images: int) -> list[int]:
    """What a consumer of the processor gives the model."""
    image = Image.new("RGB", (20, 10))
    ids: list[int] = processor(text=[text], images=[image] * images)["input_ids"][0]
    return list(ids)


def check(processor: Any, spoken: tuple[Turn, ...]) -> None:
    whole = record(spoken)
    made = tokenise(whole, processor)
    tokenizer = processor.tokenizer
    answers = [turn.text for turn in spoken if turn.role == "assistant"]
    learnt = stretches(made.labels)
    ends = end_of_turn_ids(tokenizer, processor.chat_template)
    decoded = [tokenizer.decode(ids[:-1], skip_special_tokens=True).strip() for _, ids in learnt]
    assert decoded == answers
    assert all(ids[-1] in ends for _, ids in learnt)
    assert made.input_ids.count(tokenizer.bos_token_id) == 1 and made.input_ids[0] == tokenizer.bos_token_id
    per_image = processor.num_image_tokens((64, 64))
    assert made.input_ids.count(processor.image_token_id) == per_image * len(whole.images)
    asked = [index for index, turn in enumerate(spoken) if turn.role == "assistant"]
    for index, (start, _) in zip(asked, learnt, strict=True):
        prompt = render(processor, [message(turn) for turn in spoken[:index]], generation=True)
        seen = sum(turn.text.count("<image>") for turn in spoken[:index])
        assert ids_of(processor, prompt, seen) == made.input_ids[:start]


def check_questions(processor: MoeVisionProcessor) -> None:
    """A selector finds the questions in a conversation with an image."""
    tokenizer = processor.tokenizer
    markers = turns_of(tokenizer, processor.chat_template)
    spoken = turns("<image>what is it", "a cat", "which colour")
    text = render(processor, [message(turn) for turn in spoken], generation=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = tokenizer.decode(ids[0][question_mask(ids, markers)[0]])
    assert "".join(found.split()) == "<image>whatisitwhichcolour"


def check_texts(name: str, processor: MoeVisionProcessor) -> None:
    """A wrapped template prints conversations without images as the published one does, which gets lists of parts where
    it takes nothing else. Gemma's first takes no system turn.
    """
    tokenizer = processor.tokenizer
    without_system = name in ("gemma", "gemma_training", "llava_next", "llava_next_training")
    for spoken in (turns("how many", "two squares", "is it a dog", "no"), turns("how many", "two", system="Be kind.")):
        if spoken[0].role == "system" and without_system:
            continue
        messages = [message(turn) for turn in spoken]
        if any(word in name for word in ("idefics", "smolvlm", "llava")):
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        expected = tokenizer.apply_chat_template(messages, chat_template=TRL[name], tokenize=False)
        assert render_chat(tokenizer, processor.chat_template, messages) in (expected, f"<s>{expected}")


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_answers_are_learnt_after_their_prompts(name: str, kind: str) -> None:
    processor = processor_of(name, kind)
    for spoken in CONVERSATIONS.values():
        check(processor, spoken)
    check_questions(processor)
    assert usable_template(processor.tokenizer, processor.chat_template, name) == processor.chat_template
    if name in TRL:
        check_texts(name, processor)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("name", OURS)
def test_our_templates_do_without_their_special_tokens(name: str, kind: str) -> None:
    """Of a tokenizer that lacks them, the end token ends answers."""
    processor = processor_of(name, kind, marked=False)
    assert end_of_turn_ids(processor.tokenizer, processor.chat_template) == [processor.tokenizer.eos_token_id]
    for spoken in CONVERSATIONS.values():
        check(processor, spoken)


@pytest.mark.parametrize("name", OURS)
def test_our_marks_are_the_answers(name: str) -> None:
    """transformers' own mask of the template's generation blocks gives the same labels."""
    processor = processor_of(name, "byte_level")
    spoken = turns("how many", "two squares", "is it a dog", "no")
    made = tokenise(record(spoken), processor)
    masked: Any = processor.tokenizer.apply_chat_template(
        [message(turn) for turn in spoken], chat_template=processor.chat_template, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    marks = zip(masked["input_ids"], masked["assistant_masks"], strict=True)
    assert masked["input_ids"] == made.input_ids
    assert [token if mask else IGNORED for token, mask in marks] == made.labels


def test_a_template_that_takes_no_form_is_refused() -> None:
    tokenizer = small_tokenizer("byte_level")
    broken = {
        "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}": "with a string as content",
        "{% for m in messages[:1] %}{{ m['content'] }}{{ eos_token }}{% endfor %}": "0 times instead of 1",
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}": "no special token",
        "{% for m in messages %}{{ m['content'] }": "TemplateSyntaxError",
        "{{ nothing.at.all }}": "UndefinedError",
    }
    for template, cause in broken.items():
        with pytest.raises(ValueError, match=r"language_model\.chat_template: 'mine\.jinja' cannot .*Hint") as caught:
            usable_template(tokenizer, template, "'mine.jinja'")
        assert cause in str(caught.value)


def test_the_image_token_in_a_text_is_a_fault_of_its_record() -> None:
    tokenizer = small_tokenizer("byte_level", ("<|image_pad|>",))
    tokenizer.image_token = "<|image_pad|>"
    images: Any = tiny_model(("clip",))[1].image_processor
    processor = MoeVisionProcessor(images, tokenizer, usable_template(tokenizer, OURS["chatml"], "chatml"))
    check(processor, CONVERSATIONS["two images"])
    with pytest.raises(RecordFault, match=r"'r'.*<\|image_pad\|>.*image token") as caught:
        tokenise(record(turns("what does <|image_pad|> mean", "nothing")), processor)
    assert caught.value.reason == "markers"
    with pytest.raises(RecordFault, match=r"the question contains '<\|image_pad\|>'"):
        prompt_text(processor, turns("what does <|image_pad|> mean"), [])


def test_templates_do_without_a_beginning_token() -> None:
    tokenizer = small_tokenizer("byte_level", ("<|im_end|>",), False)
    tokenizer.bos_token = None
    for name, template in {**OURS, "llama3 of TRL": TRL["llama3"] + "{# </s> #}"}.items():
        if name == "llama3 of TRL":
            template = template.replace("<|eot_id|>", "<|im_end|>")
        usable = usable_template(tokenizer, template, name)
        text = render_chat(tokenizer, usable, [{"role": "user", "content": "hello"}], generation=True)
        assert "hello" in text and "<s>" not in text and "None" not in text


def test_presets_take_the_template_of_their_language_model() -> None:
    """eagle-x5-small, which search/eagle builds on, has Qwen 2.5's own; the tokenizer may hold several by name."""
    config = load_config(ModelConfig, packaged_config("model/eagle-x5-small.yaml"))
    tokenizer = copy.deepcopy(small_tokenizer("byte_level", marks(TRL["qwen2_5"]), False))
    tokenizer.chat_template = {"default": TRL["qwen2_5"], "tool_use": "{{ nothing }}"}
    images: Any = tiny_model(("clip",))[1].image_processor
    processor = MoeVisionProcessor(images, tokenizer, chat_template_of(config, tokenizer))
    text = render(processor, [message(turn) for turn in CONVERSATIONS["image in a later turn"]])
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nis it a dog<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\n<image>\nwhat is it<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n"
    )


def test_answers_are_decoded_without_an_end_token_that_is_not_marked_special() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=False), AddedToken("<|im_end|>", special=False)])
    answer = tokenizer("yes<|im_end|>")["input_ids"]
    assert "<|im_end|>" in tokenizer.decode(answer, skip_special_tokens=True)
    language = {**tiny_values()["language_model"], "chat_template": "chatml"}
    config = validate(ModelConfig, tiny_values(language_model=language), source="tiny")
    processor = make_processor(config, config.hf_config(tokenizer.convert_tokens_to_ids("<image>")), tokenizer)
    assert processor.decode(answer, skip_special_tokens=True).strip() == "yes"
    assert processor.image_token == "<image>"
