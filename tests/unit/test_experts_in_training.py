"""Experts under gradient checkpointing, frozen, and compiled: the same numbers."""

import shutil
from typing import Any

import pytest
import torch

from moe_vision.config import validate
from moe_vision.experts import EXPERTS, Expert
from moe_vision.modeling.compose import compile_experts
from moe_vision.modeling.model_config import ModelConfig
from tests.contract.test_experts import ALL, micro
from tests.tiny import tiny_model, tiny_values

FAMILIES = ("clip", "convnext", "sam", "eva02", "pix2struct", "siglip", "dinov3", "radio")


def gradients(expert: Expert, views: torch.Tensor) -> dict[str, torch.Tensor]:
    expert.zero_grad()
    expert(views).data.square().mean().backward()
    return {key: parameter.grad.clone() for key, parameter in expert.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_recomputes_every_family(name: str) -> None:
    model, _ = tiny_model(("clip",))
    torch.manual_seed(0)
    expert: Expert = micro(name).build().train()
    views = torch.rand(2, 3, 128, 128)
    plain = gradients(expert, views)
    model.model.vision_tower.experts["clip"] = expert
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed: list[object] = []
    for module in expert.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = recording(module._gradient_checkpointing_func, checkpointed)
    recomputed = gradients(expert, views)
    assert checkpointed, f"no block of {name} was checkpointed"
    assert recomputed.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, atol=1e-6, rtol=1e-4)


def recording(checkpoint: Any, calls: list[object]) -> Any:
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, **kwargs)

    return call


@pytest.mark.parametrize("name", ALL)
def test_a_frozen_expert_keeps_no_graph(name: str) -> None:
    expert: Expert = micro(name).build().requires_grad_(False)
    size = 4 * expert.config.stride_px
    output = expert(torch.rand(1, 3, size, size)).data
    assert not output.requires_grad and output.grad_fn is None
    views = torch.rand(1, 3, size, size, requires_grad=True)
    expert(views).data.sum().backward()
    assert views.grad is not None  # frozen weights do not stop a gradient to the pixels


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_expert_gives_the_same_map() -> None:
    values = tiny_values(("eva02",))
    values["experts"]["eva02"]["compile"] = True
    config = validate(ModelConfig, values, source="test")
    assert "compile" not in config.experts["eva02"].to_dict()  # a choice of the run, not of the saved model
    assert config.to_plain()["experts"]["eva02"]["compile"] is True
    model, _ = tiny_model(("eva02",))
    expert, views = model.model.vision_tower.experts["eva02"], torch.rand(2, 3, 128, 128)
    assert isinstance(expert, Expert)
    with torch.no_grad():
        plain = expert(views).data
        keys = list(model.state_dict())
        compile_experts(model, config)
        assert expert._compiled_call_impl is not None
        torch.testing.assert_close(expert(views).data, plain, atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == keys


def test_statistics_of_ones_own() -> None:
    views = torch.rand(1, 3, 64, 64)
    config = EXPERTS["clip"](variant="micro", pretrained=None, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    expected = (views - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(config.build().normalise(views), expected)
    with pytest.raises(ValueError, match=r"std \[0\.5, 0\.0, 1\.0\] of clip: must be above 0"):
        EXPERTS["clip"](variant="micro", std=(0.5, 0.0, 1.0))


@pytest.mark.parametrize(("resize", "same"), [("antialias", False), ("bilinear", False), ("align_corners", True)])
def test_corners_survive_a_resize_only_if_they_are_aligned(resize: str, same: bool) -> None:
    views = torch.rand(1, 3, 256, 256)
    expert = EXPERTS["clip"](variant="micro", pretrained=None, resize=resize).build()
    small = expert.resize(views)
    assert small.shape == (1, 3, 64, 64)
    assert torch.allclose(small[..., 0, 0], views[..., 0, 0]) == same
