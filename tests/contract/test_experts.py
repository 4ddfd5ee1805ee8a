"""Every registered expert keeps the contract, one defined outside the package included."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from moe_vision.experts import EXPERTS, Expert, ExpertConfig, ExpertSpec
from moe_vision.experts.base import HALF
from moe_vision.types import MapShape


@dataclass(frozen=True, kw_only=True)
class PluginConfig(ExpertConfig):
    specs: ClassVar[Mapping[str, ExpertSpec]] = {
        "micro": ExpertSpec(
            hub_id=None, revision=None, licence="mit", channels=8, stride_px=16, image_size=(64, 64), mean=HALF,
            std=HALF, pretraining="none",
        )
    }  # fmt: skip

    def build(self) -> "PluginExpert":
        return PluginExpert(self)


class PluginExpert(Expert):
    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self.model = nn.Conv2d(3, 8, 16, stride=16)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels)


if "contract_plugin" not in EXPERTS:
    EXPERTS.register("contract_plugin")(PluginConfig)

ALL = sorted(EXPERTS)


def micro(name: str, **changes: object) -> ExpertConfig:
    return EXPERTS[name](variant="micro", pretrained=None, **changes)


def test_the_five_families_are_registered() -> None:
    assert {"clip", "convnext", "eva02", "pix2struct", "sam"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_variant_builds_on_the_meta_device(name: str) -> None:
    for variant in EXPERTS[name].specs:
        config = EXPERTS[name](variant=variant, pretrained=None)
        with torch.device("meta"):
            module = config.build()
        assert sum(p.numel() for p in module.parameters()) > 0
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
    with pytest.raises(ValueError, match=r"image_size \[65, 96\].*the nearest that fits is \[64, 96\]"):
        config.build()(torch.rand(1, 3, 65, 96))


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
        EXPERTS.register("clip")(PluginConfig)
