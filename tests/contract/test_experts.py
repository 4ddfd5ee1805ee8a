"""Every registered expert keeps the contract, one defined outside the package included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.config import import_plugin
from moe_vision.experts import EXPERTS, ExpertConfig
from moe_vision.types import MapShape

import_plugin(Path(__file__).with_name("plugin_expert.py"))

ALL = sorted(EXPERTS)

TINY: dict[str, dict[str, Any]] = {
    "timm": {
        "variant": "eva02_large_patch14_clip_336.merged2b",
        "architecture": {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 56},
    },
}  # fmt: skip
"""A miniature of the family that has no `micro` checkpoint."""


def micro(name: str, **changes: object) -> ExpertConfig:
    config: ExpertConfig = EXPERTS[name](**{"pretrained": None, **TINY.get(name, {"variant": "micro"}), **changes})
    return config


def test_the_five_families_are_registered() -> None:
    assert {"clip", "convnext", "eva02", "pix2struct", "sam"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_variant_builds_on_the_meta_device(name: str) -> None:
    for variant in EXPERTS[name].specs:
        config = EXPERTS[name](variant=variant, pretrained=None)
        with torch.device("meta"):
            module = config.build()
        assert sum(p.numel() for p in module.parameters()) > 0
        assert (config.channels, config.stride_px) == (config.spec.channels, config.spec.stride_px)
        assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (150, 90)])
def test_any_view_gives_the_promised_shape(name: str, size: tuple[int, int]) -> None:
    config = micro(name)
    feature_map = config.build().eval()(torch.rand(2, 3, *size))
    assert feature_map.shape == config.shape == MapShape(config.channels, config.shape.grid)
    assert torch.isfinite(feature_map.data).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sizing", ["fixed", "multiple_of", "native"])
def test_rectangular_inputs(name: str, sizing: str) -> None:
    stride = micro(name).stride_px
    size = (4 * stride, 6 * stride)
    view = (size[0] + stride // 3, size[1] - stride // 3) if sizing == "multiple_of" else size
    config = micro(name, image_size=size if sizing == "fixed" else None, sizing=sizing)
    assert config.build().eval()(torch.rand(1, 3, *view)).shape.grid == (4, 6)


@pytest.mark.parametrize("name", ALL)
def test_native_refuses_a_size_off_the_stride(name: str) -> None:
    config = micro(name, sizing="native")
    stride = config.stride_px
    fits = rf"image_size \[{4 * stride + 1}, {6 * stride}\].*the nearest that fits is \[{4 * stride}, {6 * stride}\]"
    with pytest.raises(ValueError, match=fits):
        config.build()(torch.rand(1, 3, 4 * stride + 1, 6 * stride))


@pytest.mark.parametrize("name", ALL)
def test_views_do_not_influence_each_other(name: str) -> None:
    torch.manual_seed(0)
    expert, views = micro(name).build().eval(), torch.rand(3, 3, 128, 128)
    together = expert(views).data
    one_by_one = torch.cat([expert(view[None]).data for view in views])
    torch.testing.assert_close(together, one_by_one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    expert = micro(name).build()
    expert(torch.rand(2, 3, 128, 128)).data.square().sum().backward()
    without = [key for key, parameter in expert.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("name", ALL)
def test_config_round_trip(name: str) -> None:
    config = micro(name)
    plain = config.to_dict()
    assert plain.pop("type") == name
    assert EXPERTS[name](**plain, pretrained=None) == config


def test_a_size_off_the_stride_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"stride of 16 px; the nearest that fits is \[64, 96\]"):
        micro("eva02", image_size=(66, 97))


def test_a_name_that_is_taken_raises() -> None:
    with pytest.raises(ValueError, match="'clip' is registered twice"):
        EXPERTS.register("clip")(ExpertConfig)
