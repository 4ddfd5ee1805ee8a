"""C-RADIO (Ranzinger et al., 2024), several teachers distilled into one encoder, on transformers' `RadioModel`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import RadioConfig as RadioLibraryConfig
from transformers import RadioModel

from moe_vision.experts.base import CLIP_MEAN, CLIP_STD, Expert, ExpertConfig, ExpertSpec, micro_spec
from moe_vision.registry import EXPERTS


@EXPERTS.register("radio")
@dataclass(frozen=True, kw_only=True)
class RadioExpertConfig(ExpertConfig):
    """Class and register tokens run along and are dropped at the end; there is no final norm."""

    library: ClassVar = RadioLibraryConfig
    specs: ClassVar = {
        "v4_h": ExpertSpec(
            hub_id="nvidia/C-RADIOv4-H",
            revision="main",
            licence="nvidia-open-model-license",
            channels=1280,
            stride_px=16,
            image_size=(512, 512),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            pretraining="distillation of several vision models",
            # The defaults of transformers' config are this checkpoint's.
            architecture={"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 16},
            optional_keys=("summary_idxs", "input_conditioner."),
            # Layer scales of one, which the published checkpoint leaves out.
            may_miss=tuple(f"encoder.layer.{i}.layer_scale{j}." for i in range(32) for j in (1, 2)),
        ),
        "micro": micro_spec(
            "radio", channels=64, stride_px=16, size_px=128, pretraining="distillation of the five miniature experts",
            architecture={
                "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 16,
                "patch_dim": 768, "max_img_size": 512,
            },
        ),
    }  # fmt: skip

    @property
    def channels(self) -> int:
        return self.settings["hidden_size"]

    @property
    def stride_px(self) -> int:
        return self.settings["patch_size"]

    def check_size(self, size: tuple[int, int]) -> None:
        super().check_size(size)
        longest = self.settings.get("max_img_size", 2048)
        if max(size) > longest:
            raise ValueError(f"image_size {list(size)} of radio '{self.variant}': at most {longest} px a side")

    def build(self) -> "RadioExpert":
        return RadioExpert(self)


class RadioExpert(Expert):
    def __init__(self, config: RadioExpertConfig) -> None:
        super().__init__(config)
        model: Any = RadioModel(RadioLibraryConfig(**config.settings))
        model.make_preprocessor_external()  # every expert here normalises before it encodes
        del model.summary_idxs  # of the pooled summary, which nobody reads here
        self.model = model

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[V, 3, H, W] → [V, C, H / 16, W / 16]."""
        model: Any = self.model
        grid = (pixels.shape[2] // self.config.stride_px, pixels.shape[3] // self.config.stride_px)
        tokens = model.encoder(model.embeddings(pixels)).last_hidden_state[:, -grid[0] * grid[1] :]
        return tokens.transpose(1, 2).unflatten(2, grid)
