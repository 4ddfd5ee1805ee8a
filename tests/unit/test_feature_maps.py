"""What frozen experts made of pictures stands for the pictures, whatever mixes them."""

from typing import Any

import pytest
import torch

from moe_vision.fusion import MIXERS
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model

EXPERTS = ("clip", "eva02", "sam")
MIXER_SETTINGS: dict[str, dict[str, Any]] = {
    "channel_concat": {"grid": [4, 4]},
    "deformable": {"base": "eva02", "zero_init": False},
    "mr_adapter": {"base": "eva02", "num_adapters": 2, "zero_init": False},
    "patch_mining": {"base": "clip", "zero_init": False},
    "sequence_append": {},
}


def mixed_by(name: str) -> tuple[Any, Any]:
    """Model and processor of three experts under one mixer."""
    overview = {"mixer": {"type": name, **MIXER_SETTINGS[name]}, "adapter": {"type": "mlp"}}
    return tiny_model(EXPERTS, branches={"overview": overview})


def batch_of(model: Any, count: int = 2) -> dict[str, torch.Tensor]:
    """One picture in each of so many prompts."""
    tokens = model.model.policy.plan((128, 128)).num_tokens
    ids = torch.tensor([[model.config.image_token_id] * tokens + [5, 6, 7]] * count)
    pixels = torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_every_registered_mixer_has_settings_here() -> None:
    assert set(MIXER_SETTINGS) == set(MIXERS)


@pytest.mark.parametrize("name", sorted(MIXER_SETTINGS))
def test_feature_maps_stand_for_pixels(name: str) -> None:
    model, _ = mixed_by(name)
    tower, batch = model.model.vision_tower, batch_of(model)
    expected = model(**batch).logits
    injected = tower.mixers["overview"].injected
    maps = {name: tower.experts[name](batch["pixel_values"]).data for name in EXPERTS if name != injected}
    pixels = batch.pop("pixel_values")
    if injected is not None:
        with pytest.raises(ValueError, match=rf"\['{injected}'\] have no map in feature_maps"):
            model(**batch, feature_maps=maps)
        batch["pixel_values"] = pixels
    ran: list[str] = []
    for expert in EXPERTS:
        tower.experts[expert].register_forward_hook(lambda *_, expert=expert: ran.append(expert))
    assert torch.equal(model(**batch, feature_maps=maps).logits, expected)
    assert ran == ([] if injected is None else [injected])
    others = {**maps, "sam": torch.randn_like(maps["sam"])}
    assert not torch.allclose(model(**batch, feature_maps=others).logits, expected)


@pytest.mark.parametrize("name", sorted(MIXER_SETTINGS))
def test_kept_tokens_have_the_layout_of_made_ones(name: str) -> None:
    """Matrix products round by the layout: training from kept tokens would not be bitwise training from pixels."""
    model, _ = mixed_by(name)
    assert model.model.vision_tower(batch_of(model)["pixel_values"]).data.is_contiguous()


def test_an_expert_without_a_map_runs_on_pixels() -> None:
    model, _ = mixed_by("channel_concat")
    batch = batch_of(model)
    maps = {"sam": model.model.vision_tower.experts["sam"](batch["pixel_values"]).data}
    assert torch.equal(model(**batch, feature_maps=maps).logits, model(**batch).logits)


def test_maps_that_cannot_stand_for_pixels_are_refused() -> None:
    model, _ = mixed_by("mr_adapter")
    batch = batch_of(model)
    with pytest.raises(ValueError, match="feature_maps has 'eva02', between whose blocks"):
        model(**batch, feature_maps={"eva02": torch.zeros(2, 64, 8, 8)})
    with pytest.raises(ValueError, match=r"\['dino'\], which are no experts of this branch \(clip, eva02, sam\)"):
        model(**batch, feature_maps={"dino": torch.zeros(2, 64, 8, 8)})
    with pytest.raises(ValueError, match="give one of pixel_values"):
        model(**batch, feature_maps={}, mixed_tokens=torch.zeros(2, 64, 64))
    sliced, _ = tiny_model(**COMPOSITIONS["tiles"])
    with pytest.raises(ValueError, match=r"slicing 'tiles' needs pixel_values .* nothing in their place"):
        sliced.get_image_features(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64, 1]]), feature_maps={})
