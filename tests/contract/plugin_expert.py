"""An expert from outside the package, as a user's file would define it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moe_vision.experts import EXPERTS, Expert, ExpertConfig, ExpertSpec
from moe_vision.experts.base import HALF


@EXPERTS.register("contract_plugin")
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
