"""Four one-word answers, learnt by heart by a tiny language model, come back under every chat template we ship."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.config import validate
from moe_vision.data.collate import Collator, ConversationDataset
from moe_vision.data.records import load_records
from moe_vision.evaluation import evaluate
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.chat_rendering import end_of_turn_ids
from moe_vision.modeling.chat_template import usable_template
from moe_vision.modeling.model_config import ModelConfig
from tests.language_tokenizers import OURS, marks, small_tokenizer
from tests.tiny import ARCHITECTURE, tiny_model, tiny_values

CASES = Path(__file__).parents[1] / "cases" / "one_word_answers.json"


@pytest.mark.parametrize(("name", "marked"), [*((name, True) for name in OURS), ("chatml", False)])
def test_one_word_answers_are_learnt(name: str, marked: bool) -> None:
    """Tokens of this tokenizer hold the space before a word, so that under some templates an answer's only token begins
    in the prompt. marked: the tokenizer has the template's special tokens."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer("sentencepiece" if marked else "metaspace", marks(OURS[name]) if marked else ())
    images: Any = tiny_model(("clip",))[1].image_processor
    processor = MoeVisionProcessor(images, tokenizer, usable_template(tokenizer, OURS[name], name))
    values = tiny_values(("clip",), language_model={"architecture": ARCHITECTURE | {"vocab_size": len(tokenizer)}})
    config = validate(ModelConfig, values, source="words").hf_config(processor.image_token_id)
    model: Any = MoeVisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = end_of_turn_ids(tokenizer, processor.chat_template)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    records = load_records(CASES)
    dataset = ConversationDataset(records, processor)
    batch = Collator(tokenizer.pad_token_id)([dataset[i] for i in range(len(records))])
    learning = list(model.model.language_model.parameters())
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    for _ in range(300):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    report = evaluate(model, processor, records, max_new_tokens=8)
    assert [p.prediction.strip() for p in report.predictions] == [r.turns[-1].text for r in records], loss.item()
