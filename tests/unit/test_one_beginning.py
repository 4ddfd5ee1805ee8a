"""Every way to ask a model gives it the tokens of training, with one token for the beginning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

from moe_vision.config import validate
from moe_vision.data.chat import IGNORED, tokenise
from moe_vision.data.records import Record, Turn
from moe_vision.evaluation import answer
from moe_vision.export.card import model_card
from moe_vision.interop.lmms_eval import Templated
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.chat_template import usable_template
from moe_vision.modeling.model_config import ModelConfig
from tests.language_tokenizers import OURS, TRL, marks, small_tokenizer
from tests.tiny import ARCHITECTURE, tiny_model, tiny_values

QUESTION = "what is in the picture?"
CASES = [
    ("llama3", TRL["llama3"], "byte_level"), ("llama3_2", TRL["llama3_2"], "byte_level_trimmed"),
    ("gemma", TRL["gemma"], "metaspace"), ("qwen2_5", TRL["qwen2_5"], "byte_level"),
    ("glm4moe", TRL["glm4moe"], "byte_level"), ("vicuna_v1", OURS["vicuna_v1"], "sentencepiece"),
    ("chatml", OURS["chatml"], "sentencepiece"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "template", "kind"), CASES, ids=[name for name, _, _ in CASES])
def test_every_consumer_gives_the_tokens_of_training(name: str, template: str, kind: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    tokenizer = small_tokenizer(kind, marks(template))
    images: Any = tiny_model(("clip",))[1].image_processor
    MoeVisionProcessor(images, tokenizer, usable_template(tokenizer, template, name)).save_pretrained(tmp_path)
    processor: Any = MoeVisionProcessor.from_pretrained(tmp_path)
    values = tiny_values(("clip",), language_model={"architecture": ARCHITECTURE | {"vocab_size": len(tokenizer)}})
    config = validate(ModelConfig, values, source="beginning").hf_config(processor.image_token_id)
    model: Any = MoeVisionForConditionalGeneration(config).eval()
    image = Image.new("RGB", (40, 30), "red")
    image.save(tmp_path / "red.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]

    asked: dict[str, list[int]] = {}
    turns = (Turn("user", f"<image>{QUESTION}"), Turn("assistant", "yes"))
    trained = tokenise(Record("r", (tmp_path / "red.png",), turns), processor)
    expected = trained.input_ids[: next(i for i, label in enumerate(trained.labels) if label != IGNORED)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    asked["the card's recipe"] = processor(images=image, text=text, return_tensors="pt")["input_ids"][0].tolist()
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    tokenised = processor.apply_chat_template(messages, **options, return_tensors="pt")
    asked["apply_chat_template, as transformers serve calls it"] = tokenised["input_ids"][0].tolist()
    batch = processor.apply_chat_template([messages, messages], **options)
    asked["a batch"] = list(batch["input_ids"][1])
    asked["special tokens wanted"] = processor(images=image, text=text, add_special_tokens=True)["input_ids"][0]
    lmms: Any = Templated(processor)
    asked["lmms-eval"] = lmms(text=[text], images=[image], videos=[], return_tensors="pt")["input_ids"][0].tolist()

    seen: list[torch.Tensor] = []
    generate = model.generate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"][0])
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", recorded)
    pipe: Any = pipeline("image-text-to-text", model=model, processor=processor)
    pipe(text=messages, max_new_tokens=1)
    asked["pipeline"] = seen[-1].tolist()
    answer(model, processor, QUESTION, [tmp_path / "red.png"], max_new_tokens=1)
    asked["moe-vision generate"] = seen[-1].tolist()
    for way, ids in asked.items():
        assert list(ids) == expected, way
    assert expected.count(tokenizer.bos_token_id) == 1
    assert "text = processor.apply_chat_template" in model_card(model, processor, None)
    plain = processor(text=["what is it", tokenizer.bos_token + "what is it"], padding=True)["input_ids"]
    assert [list(ids).count(tokenizer.bos_token_id) for ids in plain] == [1, 1]


def test_an_end_token_is_not_added_to_a_prompt() -> None:
    """Some tokenizers end every text."""
    from tokenizers import processors

    tokenizer = small_tokenizer("byte_level", ("<|im_end|>", "<|im_start|>"))
    single = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=single)
    try:
        images: Any = tiny_model(("clip",))[1].image_processor
        processor: Any = MoeVisionProcessor(images, tokenizer, usable_template(tokenizer, OURS["chatml"], "chatml"))
        for text in ("what is it", processor.apply_chat_template([{"role": "user", "content": "what is it"}])):
            ids = list(processor(text=text)["input_ids"][0])
            assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in ids
    finally:
        tokenizer.backend_tokenizer.post_processor = before
