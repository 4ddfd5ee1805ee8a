"""Batches without images: their loss counts, and vision modules get zeros, as from any batch that does not use them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from moe_vision.data.collate import Collator, ConversationDataset
from moe_vision.data.records import load_records
from moe_vision.modeling.untouched import with_zero_gradients
from moe_vision.training.loading import load_train_config
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model
from tests.unit.test_local_branch import inputs
from tests.unit.test_schedule_kinds import ALTERNATE, PREALIGN
from tests.unit.test_schedule_kinds import schedule as stages
from tests.unit.test_training import weights
from tests.unit.toy import drop_images, lengthen_answers

CASE = Path(__file__).parents[1] / "cases" / "text_only_batch"

KINDS: dict[str, dict[str, Any]] = {
    "adapters on kept tokens": {"train": {"adapters": 1e-2}},
    "mixers on kept maps": {"train": {"mixers": 1e-2}},
    "an expert": {"train": {"adapters": 1e-2, "experts.sam": 1e-3}},
    "prealign": {"prealign": {**PREALIGN["prealign"], "experts": ["sam"]}},
    "alternate": ALTERNATE,
    "lora": {"train": {"adapters": 1e-2, "language_model": 1e-2}, "lora": {"rank": 2, "alpha": 4}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_without_images_are_a_part_of_a_large_one(tmp_path: Path, kind: str) -> None:
    """Two steps of four records, three of them without image, as one batch and one by one."""
    made = stages(
        tmp_path, KINDS[kind], max_steps=2, batch_size=4, scheduler="constant", warmup_ratio=0.0, logging_steps=1
    ).model_dump()
    if kind == "mixers on kept maps":
        overview = made["model"]["branches"]["overview"]
        overview["mixer"] = {"type": "mr_adapter", "base": "clip", "num_adapters": 1, "zero_init": False}
    written = tmp_path / "language" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"attention_dropout": 0.0}))
    lengthen_answers(tmp_path / "data" / "data.json")
    drop_images(tmp_path / "data" / "data.json", range(1, 7))
    found = []
    for size in (4, 1):
        made["stages"][0] |= {"batch_size": size, "gradient_accumulation": 4 // size}
        output = tmp_path / f"out{size}"
        model = train(TrainConfig.model_validate(made), output)
        logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        found.append((weights(model), [(log["loss"], log["grad_norm"]) for log in logs if "loss" in log]))
    (one, one_logs), (other, other_logs) = found
    for ours, theirs in zip(one_logs, other_logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for name, value in one.items():  # Adam divides by a gradient's size, so that one near 0 may turn a step
        assert ((value - other[name]).abs() < 1e-5).float().mean() > 0.99, name


def test_only_the_text_is_seen_and_nothing_moves() -> None:
    model, _ = tiny_model()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    language_model = model.model.language_model
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = language_model(input_ids=ids).last_hidden_state
        logits = hidden @ language_model.embed_tokens.weight.T
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.fill_(torch.nan)
    output = model(input_ids=ids, labels=ids)
    assert torch.equal(output.logits, logits)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_trained_vision_parameter_has_a_gradient(name: str) -> None:
    """Also where no image is cut into slices, so that their adapter, their markers and the selector are not used."""
    model, processor = tiny_model(**COMPOSITIONS[name])
    model.requires_grad_(False)
    for module in (model.model.multi_modal_projector, model.model.selector, model.model.markers):
        if module is not None:
            module.requires_grad_(True)
    whole = inputs(processor, ["<image>read label"], [Image.new("RGB", (32, 32))])
    for batch in (whole, {"input_ids": torch.randint(5, 50, (1, 9))}):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert [name for name, gradient in trained.items() if gradient is None] == []


def test_values_pass_bit_for_bit() -> None:
    values = torch.tensor([-0.0, 1e-40, 3.0], requires_grad=True)
    other = torch.tensor([torch.inf, torch.nan], requires_grad=True)
    frozen = torch.ones(1)
    joined = with_zero_gradients(values, [other, frozen])
    assert torch.equal(joined.view(torch.int32), values.view(torch.int32))
    joined.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert values.grad is not None and values.grad.tolist() == [1.0, 2.0, 3.0]
    assert other.grad is not None and other.grad.tolist() == [0.0, 0.0]
    assert with_zero_gradients(frozen, [frozen]) is frozen


def test_the_trainer_of_transformers_takes_them_too(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    records = load_records(CASE / "mixed.json")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=1, remove_unused_columns=False,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    data = ConversationDataset(records, processor)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=Collator(0))
    assert trainer.train().training_loss > 0


def test_the_case_trains(tmp_path: Path) -> None:
    """Eight records, of which four have an image, in batches of two."""
    output = tmp_path / "out"
    train(load_train_config(CASE / "mixed.yaml", ["stages.0.max_steps=4", "stages.0.epochs=null"]), output)
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert logs[0]["grad_norm"] >= 0 and 0 < logs[-1]["train_loss"] < 10
