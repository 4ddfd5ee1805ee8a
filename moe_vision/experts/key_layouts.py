"""Names that other libraries give the same weights, per family, as exact renamings into ours.

Each layout is proven in tests/unit/test_weight_sources.py against the source library's own forward pass.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KeyLayout:
    """How one source names a family's weights.

    prefix: what it puts before the keys of the image encoder; where some keys have it, the others belong to other
    parts of the checkpoint (a text encoder, a mask decoder) and are not read.
    renames: (pattern, replacement) pairs, applied one after the other; a replacement with {a,b,c} splits the tensor
    along its first axis. squeeze: keys, by our name, whose leading axes of length 1 are dropped. optional: beginnings
    of keys, by our name, that no expert reads.
    """

    source: str
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    squeeze: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def read(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `state` by our names, without the optional ones."""
        if any(key.startswith(self.prefix) for key in state):
            state = {
                key.removeprefix(self.prefix): value for key, value in state.items() if key.startswith(self.prefix)
            }
        found: dict[str, torch.Tensor] = {}
        for key, value in state.items():
            for pattern, replacement in self.renames:
                key = re.sub(pattern, replacement, key)
            head, brace, rest = key.partition("{")
            names, _, tail = rest.partition("}")
            parts = {head + name + tail: part for name, part in self.split(names.split(","), value)} if brace else {}
            found |= parts or {key: value}
        for key in self.squeeze:
            if key in found:
                found[key] = found[key].reshape([side for side in found[key].shape if side != 1])
        return {key: value for key, value in found.items() if not key.startswith(self.optional)}

    @staticmethod
    def split(names: list[str], value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Equal parts of `value` along its first axis, one for each name."""
        return list(zip(names, value.chunk(len(names)), strict=True))


VIT_BLOCK = (
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attn\.qkv\.", r".self_attn.{q_proj,k_proj,v_proj}."),
    (r"\.attn\.proj\.", r".self_attn.out_proj."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)

CONVNEXT = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    # Eagle calls it `weight`, because its transformers rewrites every `gamma`.
    (r"(layers\.\d+)\.(?:gamma|weight)$", r"\1.layer_scale_parameter"),
)

SAM = (
    (r"^", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.blocks\.(\d+)\.norm(\d)\.", r".layers.\1.layer_norm\2."),
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"\.mlp\.fc(\d)\.", r".mlp.lin\1."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
)

LAYOUTS: Mapping[str, tuple[KeyLayout, ...]] = {
    "clip": (
        KeyLayout(
            "timm",
            renames=(
                (r"^cls_token$", "embeddings.class_embedding"),
                (r"^pos_embed$", "embeddings.position_embedding.weight"),
                (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
                (r"^norm_pre\.", "pre_layrnorm."),
                *VIT_BLOCK,
            ),
            squeeze=("embeddings.class_embedding", "embeddings.position_embedding.weight"),
            optional=("norm.", "head."),
        ),
        KeyLayout(
            "open_clip",
            prefix="visual.",
            renames=(
                (r"^class_embedding$", "embeddings.class_embedding"),
                (r"^positional_embedding$", "embeddings.position_embedding.weight"),
                (r"^conv1\.", "embeddings.patch_embedding."),
                (r"^ln_pre\.", "pre_layrnorm."),
                (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
                (r"\.ln_(\d)\.", r".layer_norm\1."),
                (r"\.attn\.in_proj_", ".self_attn.{q_proj,k_proj,v_proj}."),
                (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
                (r"\.mlp\.c_fc\.", ".mlp.fc1."),
                (r"\.mlp\.c_proj\.", ".mlp.fc2."),
            ),
            optional=("ln_post.", "proj"),
        ),
    ),
    "convnext": (
        KeyLayout("timm", renames=CONVNEXT, optional=("head.",)),
        KeyLayout("open_clip", prefix="visual.trunk.", renames=CONVNEXT, optional=("head.",)),
        KeyLayout("transformers", prefix="convnext.", optional=("layernorm.", "classifier.")),
    ),
    # After the public prefix `encoder.`, which the library's own encoder has inside too.
    "pix2struct": (KeyLayout("transformers' Pix2StructVisionModel or Eagle"),),
    "siglip": (
        KeyLayout(
            "timm or OryxViT",
            prefix="vision_tower.",
            renames=(
                (r"^pos_embed$", "embeddings.position_embedding.weight"),
                (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
                (r"^norm\.", "post_layernorm."),
                *VIT_BLOCK,
            ),
            squeeze=("embeddings.position_embedding.weight",),
            optional=("attn_pool.", "fc_norm.", "head."),
        ),
    ),
    "dinov3": (KeyLayout("the Hub", renames=((r"^layer\.", "model.layer."),), optional=("rope_embeddings.",)),),
    "radio": (
        KeyLayout(
            "the Hub",
            prefix="radio_model.",
            renames=(
                (r"^model\.patch_generator\.embedder\.", "embeddings.patch_projection."),
                (r"^model\.patch_generator\.pos_embed$", "embeddings.position_embedding"),
                (r"^model\.patch_generator\.cls_token\.token$", "embeddings.cls_register_token"),
                (r"^model\.blocks\.", "encoder.layer."),
                (r"\.attn\.qkv\.", ".attention.{q_proj,k_proj,v_proj}."),
                (r"\.attn\.proj\.", ".attention.o_proj."),
            ),
            optional=("summary_idxs", "input_conditioner.", "model.patch_generator.video_embedder."),
        ),
    ),
    "timm": (KeyLayout("timm", renames=((r"^(?!timm_model\.)", "timm_model."),)),),
    "sam": (
        KeyLayout("timm or Eagle", renames=SAM),
        KeyLayout("segment_anything", prefix="image_encoder.", renames=SAM),
    ),
}
"""Layouts of each family, by its registered name; its own, by the spec's prefix, is always tried first."""
