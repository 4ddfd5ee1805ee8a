"""SigLIP, DINOv3, RADIO and timm's models: folders as the Hub serves them, against the library's own forward."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    RadioConfig,
    RadioModel,
    SiglipConfig,
    SiglipModel,
)

from moe_vision.experts import EXPERTS, Expert
from moe_vision.experts.weights import WeightsError, load_expert_weights
from tests.unit.test_weight_sources import PLAIN, same, shaken

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def loaded(name: str, source: Path, **settings: Any) -> Expert:
    expert: Expert = EXPERTS[name](**{**PLAIN, **settings}).build().eval()
    load_expert_weights(expert, str(source))
    return expert


def as_map(tokens: torch.Tensor, size: tuple[int, int], patch: int = 16) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize(("layer", "final_norm"), [(-1, True), (-2, False)])
def test_siglip(tmp_path: Path, size: tuple[int, int], layer: int, final_norm: bool) -> None:
    vision = {**VIT, "image_size": 64, "patch_size": 16}
    text = {**VIT, "vocab_size": 16, "max_position_embeddings": 8}
    model: Any = shaken(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    model.save_pretrained(tmp_path)
    views = torch.rand(2, 3, *size)
    with torch.no_grad():
        output = model.vision_model(views, interpolate_pos_encoding=True, output_hidden_states=True)
    expected = output.last_hidden_state if final_norm else output.hidden_states[layer]
    expert = loaded(
        "siglip", tmp_path, variant="v2_base_patch16_512", architecture=vision, image_size=size, layer=layer,
        final_norm=final_norm, antialias_positions=False,
    )  # fmt: skip
    same(expert, as_map(expected, size), views)


def test_siglip_at_a_patch_that_does_not_divide() -> None:
    config = EXPERTS["siglip"](variant="v2_so400m_patch14_384", pretrained=None)
    assert config.size == (378, 378) and config.shape.grid == (27, 27)


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_dinov3(tmp_path: Path, size: tuple[int, int]) -> None:
    settings = {**VIT, "num_register_tokens": 4}
    model: Any = shaken(DINOv3ViTModel(DINOv3ViTConfig(**settings)))
    model.save_pretrained(tmp_path)
    views = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = model(views).last_hidden_state[:, 5:]
    same(loaded("dinov3", tmp_path, variant="vits16", architecture=VIT, image_size=size), as_map(expected, size), views)


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_radio_with_its_own_statistics(tmp_path: Path, size: tuple[int, int]) -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_img_size": 128}
    model: Any = shaken(RadioModel(RadioConfig(**settings)))
    model.save_pretrained(tmp_path)
    views = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = model(views).features
    expert = loaded(
        "radio", tmp_path, variant="v4_h", architecture=settings, image_size=size, mean=None, std=None
    )  # fmt: skip
    same(expert, as_map(expected, size), views)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("eva02_large_patch14_clip_336.merged2b", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 56}, 14),
        ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", {"depth": 2, "embed_dim": 24, "num_heads": 2}, 14),
        ("vit_so400m_patch14_siglip_384.webli", {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 56}, 14),
        ("convnext_atto.d2_in1k", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 24]}, 32),
        ("resnet18.a1_in1k", {}, 32),
    ],
)
@pytest.mark.parametrize("final_norm", [False, True])
def test_timm(tmp_path: Path, name: str, arguments: dict[str, Any], size: int, final_norm: bool) -> None:
    flexible = {"dynamic_img_size": True} if "vit" in name or "eva" in name else {}
    model: Any = shaken(timm.create_model(name, pretrained=False, **arguments, **flexible))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    views = torch.rand(2, 3, 4 * size, 6 * size)
    with torch.no_grad():
        expected = model.forward_intermediates(views, indices=1, norm=final_norm, intermediates_only=True)[-1]
    expert = loaded(
        "timm", tmp_path, variant=name, architecture=arguments, image_size=(4 * size, 6 * size), final_norm=final_norm
    )
    same(expert, expected, views)


def test_timm_names_and_arguments() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'eva02_large_patch14_clip_33'.*did you mean 'eva02_large"):
        EXPERTS["timm"](variant="eva02_large_patch14_clip_33")
    with pytest.raises(ValueError, match=r"architecture of timm 'resnet18\.a1_in1k' is refused.*widht"):
        EXPERTS["timm"](variant="resnet18.a1_in1k", architecture={"widht": 3})
    config = EXPERTS["timm"](variant="resnet18.a1_in1k")
    assert (config.channels, config.stride_px, config.size) == (512, 32, (224, 224))
    assert config.spec.hub_id == "timm:resnet18.a1_in1k"


@pytest.mark.parametrize("name", sorted(EXPERTS["timm"].specs))
def test_the_table_of_timms_models_is_timms_own(name: str) -> None:
    from moe_vision.experts.timm_models import spec_from_timm

    ours, theirs = EXPERTS["timm"].specs[name], spec_from_timm(name)
    for fact in ("hub_id", "licence", "channels", "stride_px", "image_size", "mean", "std"):
        assert getattr(ours, fact) == getattr(theirs, fact)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    DINOv3ViTModel(DINOv3ViTConfig(**VIT)).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="do not fit expert siglip"):
        loaded("siglip", tmp_path, variant="v2_base_patch16_512", architecture={**VIT, "image_size": 64})
