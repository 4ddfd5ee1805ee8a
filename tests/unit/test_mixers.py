"""Mixers within a composed model: what they begin with, what they learn, what they refuse, what an export holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.config import ConfigError, validate
from moe_vision.experts.weights import load_expert_weights
from moe_vision.export import export
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import load, save
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training.groups import freeze_all_but, parameter_groups
from tests.sliced import pictures
from tests.tiny import tiny_model, tiny_values

BASED: dict[str, dict[str, Any]] = {
    "deformable": {"type": "deformable", "base": "eva02", "num_heads": 4, "num_levels": 2},
    "mr_adapter": {"type": "mr_adapter", "base": "eva02", "num_adapters": 2},
    "patch_mining": {"type": "patch_mining", "base": "clip"},
}
EXPERTS = ("clip", "eva02", "sam")


def branches(mixer: dict[str, Any], **adapter: Any) -> dict[str, Any]:
    return {"overview": {"mixer": mixer, "adapter": {"type": "mlp", **adapter}}}


def composed(mixer: dict[str, Any]) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    model, processor = tiny_model(EXPERTS, branches=branches(mixer))
    for expert in model.model.vision_tower.experts.values():
        load_expert_weights(expert, "default")
    return model, processor


def batch_of(processor: MoeVisionProcessor) -> dict[str, torch.Tensor]:
    texts = ["<image>read label", "<image>how many shapes"]
    return dict(processor(text=texts, images=pictures([(90, 140), (64, 64)]), padding=True, return_tensors="pt"))


@torch.no_grad()
@pytest.mark.parametrize("name", list(BASED))
def test_an_operator_begins_as_its_base(name: str) -> None:
    model, processor = composed(BASED[name])
    views = batch_of(processor)["pixel_values"]
    base = model.model.vision_tower.experts[BASED[name]["base"]](views).data.flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.model.vision_tower(views).data, base, atol=1e-5, rtol=1e-5)
    other, _ = composed(BASED[name] | {"zero_init": False})
    assert (other.model.vision_tower(views).data - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(BASED))
def test_gradients_reach_all_that_trains_through_frozen_experts(name: str) -> None:
    model, processor = composed(BASED[name] | {"zero_init": False})
    freeze_all_but(model, ["mixers", "adapters"])
    batch = batch_of(processor)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    groups = parameter_groups(model)
    assert groups["mixers"]
    for group, members in groups.items():
        for parameter_name, parameter in members:
            trains = group in ("mixers", "adapters")
            assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, parameter_name


@torch.no_grad()
@pytest.mark.parametrize("name", ["sequence_append", *BASED])
def test_saved_exported_and_in_batches_it_is_the_same(name: str, tmp_path: Path) -> None:
    mixer = BASED.get(name, {"type": "sequence_append", "grids": {"sam": [4, 4]}})
    model, processor = composed(mixer | ({"zero_init": False} if name in BASED else {}))
    batch = batch_of(processor)
    logits = model(**batch).logits
    for row in range(2):
        views = batch["pixel_values"][row : row + 1]
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()} | {"pixel_values": views}).logits
        torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)
    save(model, processor, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    assert torch.equal(again(**batch).logits, logits)
    assert export(tmp_path / "model", tmp_path / "folder").max_difference == 0
    code = (tmp_path / "folder" / "modeling_moe_vision.py").read_text()
    others = {"SequenceAppend", "Deformable", "MrAdapter", "PatchMining", "ChannelConcat"} - {type(
        model.model.vision_tower.mixers["overview"]).__name__}  # fmt: skip
    assert not any(f"class {other}(" in code for other in others)  # the one in use


@pytest.mark.parametrize(
    ("experts", "mixer", "said"),
    [
        (("clip",), {"type": "deformable"}, "deformable adds other experts to 'clip', and this branch has no other"),
        (EXPERTS, {"type": "deformable", "base": "eva2"}, "did you mean 'eva02'?"),
        (EXPERTS, {"type": "deformable", "num_heads": 7}, "num_heads 7 of deformable does not divide its width 64"),
        (EXPERTS, {"type": "deformable", "num_heads": 4, "num_levels": 5}, "num_levels 5 of deformable leaves nothing"),
        (("eva02", "clip"), {"type": "patch_mining"}, "a grid of [4, 4] does not nest in one of [8, 8]"),
        (("sam", "clip"), {"type": "mr_adapter"}, "speaks between the blocks of its base, and expert 'sam'"),
        (EXPERTS, {"type": "mr_adapter", "num_adapters": 5}, "num_adapters 5 of mr_adapter; the base has 3 blocks"),
        (("sam", "clip"), {"type": "sequence_append", "grids": {"sm": [4, 4]}}, "did you mean 'sam'?"),
    ],
)
def test_what_cannot_work_is_said_before_weights_load(experts: tuple[str, ...], mixer: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(ModelConfig, tiny_values(experts, branches=branches(mixer)), source="test")
    assert said in str(error.value), error.value


def test_tokens_in_a_sequence_are_no_raster() -> None:
    with pytest.raises(ConfigError, match="pool 2 of mlp needs tokens on a raster; this mixer gives none"):
        values = tiny_values(EXPERTS, branches=branches({"type": "sequence_append"}, pool=2))
        validate(ModelConfig, values, source="test")
