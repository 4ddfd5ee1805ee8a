"""ConvNeXt (Liu et al., 2022) as trained by CLIP on LAION, on transformers' `ConvNextModel`.

The last stage's map is taken as it is, without the classifier's norm, as Eagle does.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import ConvNextConfig as LibraryConfig
from transformers import ConvNextModel

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


@EXPERTS.register("convnext")
@dataclass(frozen=True, kw_only=True)
class ConvNextConfig(ExpertConfig):
    """A map of the last stage; any size that its stride divides."""

    library: ClassVar = LibraryConfig
    specs: ClassVar = {
        "xxlarge_clip": ExpertSpec(
            hub_id="timm/convnext_xxlarge.clip_laion2b_soup",
            revision="main",
            licence="apache-2.0",
            channels=3072,
            stride_px=32,
            image_size=(1024, 1024),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="image-text contrast, LAION-2B",
            # transformers writes 1e-6 into every block; CLIP's ConvNeXt was trained with 1e-5.
            architecture={"hidden_sizes": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "num_stages": 4,
                          "layer_norm_eps": 1e-5},
        ),
        # What timm resolves the bare name `convnext_xxlarge` to, and so what Eagle's code starts from.
        "xxlarge_clip_ft_in1k": ExpertSpec(
            hub_id="timm/convnext_xxlarge.clip_laion2b_soup_ft_in1k",
            revision="main",
            licence="apache-2.0",
            channels=3072,
            stride_px=32,
            image_size=(1024, 1024),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="image-text contrast, LAION-2B; classification, ImageNet-1k",
            architecture={"hidden_sizes": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "num_stages": 4,
                          "layer_norm_eps": 1e-5},
        ),
        "large_clip_320": ExpertSpec(
            hub_id="timm/convnext_large_mlp.clip_laion2b_ft_soup_320",
            revision="main",
            licence="apache-2.0",
            channels=1536,
            stride_px=32,
            image_size=(320, 320),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="image-text contrast, LAION-2B",
            architecture={"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "num_stages": 4,
                          "layer_norm_eps": 1e-6},
        ),
        "micro": micro_spec(
            "convnext", channels=96, stride_px=16, size_px=128, pretraining="textures and shapes of generated scenes",
            architecture={"hidden_sizes": [24, 48, 96], "depths": [2, 2, 4], "num_stages": 3,
                          "layer_norm_eps": 1e-6, "layer_scale_init_value": 0.5},
        ),
    }  # fmt: skip

    @property
    def channels(self) -> int:
        return self.settings["hidden_sizes"][-1]

    @property
    def stride_px(self) -> int:
        return 4 * 2 ** (len(self.settings["hidden_sizes"]) - 1)

    def left_out(self) -> tuple[str, ...]:
        return ("layernorm.",)

    def build(self) -> "ConvNextExpert":
        return ConvNextExpert(self)


PIECE = 4096
"""Cells whose four times wider hidden layer is held at a time if no gradient needs it; 1024 pixels have 65,536."""


def block_in_pieces(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` of the library's block, x [V, C, h, w], with the part that works cell by cell in pieces."""
    cells = layer.dwconv(x).permute(0, 2, 3, 1)
    shape = cells.shape
    pieces = []
    for piece in cells.reshape(-1, shape[-1]).split(PIECE):
        piece = layer.pwconv2(layer.act(layer.pwconv1(layer.layernorm(piece))))
        pieces.append(piece if layer.layer_scale_parameter is None else layer.layer_scale_parameter * piece)
    return x + torch.cat(pieces).view(shape).permute(0, 3, 1, 2)


class ConvNextExpert(Expert):
    config: ConvNextConfig
    gradient_checkpointing = False  # transformers sets this and the function below in every module that has it
    _gradient_checkpointing_func: Any = None

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.model = ConvNextModel(LibraryConfig(**config.settings))
        self.model.layernorm = nn.Identity()  # type: ignore[assignment]  # belongs to the pooled output, which nobody reads here
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.settings["layer_norm_eps"]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 32, W / 32] (with four stages)."""
        model: Any = self.model
        x = model.embeddings(pixels)
        for stage in model.encoder.stages:
            for layer in stage.downsampling_layer:
                x = layer(x)
            for layer in stage.layers:
                if self.checkpoints:
                    x = self._gradient_checkpointing_func(layer, x)
                else:
                    # On the meta device there is no memory to save, and counting is quicker with one piece.
                    whole = torch.is_grad_enabled() or x.is_meta
                    x = layer(x) if whole else block_in_pieces(layer, x)
        return x

    @property
    def checkpoints(self) -> bool:
        """Whether blocks are recomputed in the backward pass; transformers' ConvNeXt cannot do that by itself."""
        return self.gradient_checkpointing and self.training
