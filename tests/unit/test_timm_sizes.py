"""Maps of timm's models: what a config plans is what the model gives, at any size that the model takes."""

import ast
import inspect
import sys
from typing import Any

import pytest
import timm
import torch

from moe_vision.experts import EXPERTS
from moe_vision.export.card import model_card
from moe_vision.modeling.flatten import ALLOWED
from tests.tiny import tiny_model

STRIDES = {
    "resnet10t": 32, "resnet18": 32, "seresnet50": 32, "skresnet18": 32, "resnest14d": 32,
    "regnety_002": 32, "nf_regnet_b0": 32, "densenet121": 32, "vgg11": 32, "dla34": 32, "dpn48b": 32,
    "hrnet_w18_small": 32,
    "efficientnet_b3": 32, "mixnet_s": 32, "mobilenetv2_050": 32, "mobilenetv3_small_050": 32, "ghostnet_100": 32,
    "lcnet_050": 32, "tinynet_e": 32, "inception_v3": 32, "xception41": 32, "repvgg_a0": 32,
    "convnext_atto": 32, "convnextv2_atto": 32, "convmixer_768_32": 7, "poolformer_s12": 32, "edgenext_xx_small": 32,
    "mobilevit_xxs": 32, "davit_tiny": 32, "pvt_v2_b0": 32, "levit_128s": 64,
    "vit_tiny_patch16_224": 16, "deit_tiny_patch16_224": 16, "beit_base_patch16_224": 16, "eva02_tiny_patch14_224": 14,
    "vit_base_patch16_siglip_224": 16, "vit_small_patch14_dinov2": 14, "swin_tiny_patch4_window7_224": 32,
    "maxvit_tiny_tf_224": 32, "coatnet_0_rw_224": 32,
}  # fmt: skip
"""Models of different kinds, with the stride of their last map: timm's `reduction`."""

FIXED = {
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_tiny_tf_224",
    "coatnet_0_rw_224",
    "levit_128s",
}
"""Those that take other sizes only in part, because of windows or tables of positions."""

REAL = ("resnet10t", "tinynet_e", "mobilenetv3_small_050", "eva02_tiny_patch14_224", "vit_tiny_patch16_224")
"""Those that are run with weights; the others run on the meta device."""


@pytest.mark.parametrize("name", sorted(STRIDES))
def test_a_map_has_the_planned_shape(name: str) -> None:
    default = EXPERTS["timm"](variant=name, pretrained=None)
    stride = STRIDES[name]
    assert default.stride_px == stride
    side = timm.get_pretrained_cfg(name).input_size[-1]
    assert default.size == (side, side)
    with torch.device("cpu" if name in REAL else "meta"):
        expert: Any = default.build().eval()
    sizes = [(side, side)]
    for size in ((side + 2 * stride, side - stride), (side // 2 // stride * stride + stride, 3 * stride)):
        try:
            config = EXPERTS["timm"](variant=name, pretrained=None, image_size=size)
        except ValueError as error:
            assert name in FIXED, error
            assert f"image_size {list(size)} of timm '{name}' is refused by the model" in str(error)
        else:
            assert config.size == size
            sizes.append(size)
    with torch.no_grad():
        for size in sizes:
            pixels = torch.zeros(1, 3, *size, device=next(expert.parameters()).device)
            found = expert.encode(pixels)
            planned = default.shape_at(size)
            assert tuple(found.shape[1:]) == (planned.channels, *planned.grid), size
    assert name in FIXED or len(sizes) == 3


def test_sizes_that_are_no_multiples_of_the_stride_are_planned_as_the_model_pads() -> None:
    config = EXPERTS["timm"](variant="resnet10t", pretrained=None, sizing="native")
    expert = config.build().eval()
    for size, grid in (((176, 176), (6, 6)), ((100, 33), (4, 2)), ((1, 1), (1, 1))):
        assert config.shape_at(size).grid == expert(torch.rand(1, 3, *size)).shape.grid == grid
    assert EXPERTS["timm"](variant="inception_v3", pretrained=None).shape.grid == (8, 8)  # 299 px, convolved unpadded
    assert EXPERTS["timm"](variant="efficientnet_b3", pretrained=None).stride_px == 32


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("beit_base_patch16_224", [256, 256], "it takes [224, 224]"),
        ("vit_tiny_patch16_224", [100, 100], "the nearest that fits is [96, 96]"),
        ("inception_v3", [32, 32], "it takes [299, 299]"),
        ("resnet10t", [0, 64], "the nearest that fits is [32, 64]"),
    ],
)
def test_a_size_that_a_model_refuses_is_named_with_one_that_fits(name: str, size: list[int], hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        EXPERTS["timm"](variant=name, pretrained=None, image_size=size)
    assert f"image_size {size} of timm '{name}' is refused by the model (" in str(caught.value)
    assert str(caught.value).endswith(f"); {hint}")


def test_arguments_that_change_the_map_change_the_plan() -> None:
    config = EXPERTS["timm"](variant="resnet18", pretrained=None, architecture={"output_stride": 8})
    assert config.stride_px == 8 and config.shape.grid == (28, 28)
    assert config.build().eval()(torch.rand(1, 3, 224, 224)).shape.grid == (28, 28)
    other = EXPERTS["timm"](variant="swin_tiny_patch4_window7_224", pretrained=None, architecture={"img_size": 448})
    assert other.size == (448, 448) and other.shape.grid == (14, 14)


def test_the_card_of_an_export_lists_the_packages_that_its_experts_import() -> None:
    timm_expert = {"variant": "resnet10t", "pretrained": None, "image_size": [64, 64]}
    clip = {"variant": "micro", "pretrained": None}
    for experts, package in (({"clip": clip, "timm": timm_expert}, " timm"), ({"clip": clip}, "")):
        card = model_card(*tiny_model(experts), None)
        assert f"# pip install torch torchvision transformers pillow{package}\n" in card
        assert ("`timm`" in card.split("## Use")[1]) == bool(package)


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_a_family_names_every_package_that_its_file_imports(name: str) -> None:
    module = EXPERTS[name].__module__
    if not module.startswith("moe_vision."):
        pytest.skip("a plug-in of another test")
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    plain |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {root.split(".")[0] for root in plain} - ALLOWED - {"moe_vision"} == set(EXPERTS[name].packages)
