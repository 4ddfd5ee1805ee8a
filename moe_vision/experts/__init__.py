"""Vision experts: one file per family, each a thin adapter over the implementation that serves best.

    views [V, 3, H, W] in [0, 1] ─ resize, normalise, encode ─ FeatureMap [V, C, h, w]

>>> from moe_vision.experts import EXPERTS
>>> expert = EXPERTS["sam"](variant="micro").build()
>>> expert(torch.rand(2, 3, 128, 128)).data.shape
torch.Size([2, 64, 8, 8])
"""

from moe_vision.experts.base import Expert, ExpertConfig, ExpertSpec
from moe_vision.experts.clip import ClipConfig, ClipExpert
from moe_vision.experts.convnext import ConvNextConfig, ConvNextExpert
from moe_vision.experts.dinov3 import DinoV3Config, DinoV3Expert
from moe_vision.experts.eva02 import Eva02Config, Eva02Expert
from moe_vision.experts.pix2struct import Pix2StructConfig, Pix2StructExpert
from moe_vision.experts.radio import RadioExpert, RadioExpertConfig
from moe_vision.experts.sam import SamConfig, SamExpert
from moe_vision.experts.siglip import SiglipConfig, SiglipExpert
from moe_vision.experts.timm_models import TimmConfig, TimmExpert
from moe_vision.registry import EXPERTS

__all__ = [
    "EXPERTS", "ClipConfig", "ClipExpert", "ConvNextConfig", "ConvNextExpert", "DinoV3Config", "DinoV3Expert",
    "Eva02Config", "Eva02Expert", "Expert", "ExpertConfig", "ExpertSpec", "Pix2StructConfig", "Pix2StructExpert",
    "RadioExpert", "RadioExpertConfig", "SamConfig", "SamExpert", "SiglipConfig", "SiglipExpert", "TimmConfig",
    "TimmExpert",
]  # fmt: skip
