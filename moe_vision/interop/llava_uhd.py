"""LLaVA-UHD's checkpoint folders (thunlp/LLaVA-UHD, branch LLaVA-UHD-v1, `LlavaLlamaForCausalLM`) → ours.

Key names are those of the published classes: CLIP under `model.vision_tower.vision_tower`, where the folder has it at
all; the resampler under `model.mm_projector`; the rest is transformers' Llama. The published evaluation enlarged some
images to 1024 pixels first; here a plan depends on the image alone.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.interop.checkpoint import (
    CheckpointError,
    Source,
    Weights,
    assemble,
    check_settings,
    clip_variant,
    clip_weights,
    language_key,
    llama_values,
    published_config,
    refuse_existing,
    resampler_weights,
    under,
)
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.model_config import ModelConfig, packaged_config

QUERIES_OF_PROJECTORS = {"adapt_spatial_resampler": 144, "adapt_spatial_resampler_v1": 144, "uhd_v1_query64": 64}
"""Queries of each published name of the resampler that attends to cells; the later two are from branches v2 and v3."""

TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."


def import_llava_uhd(source: Path, output: Path, overrides: Sequence[str] = (), allow_bin: bool = False) -> Path:
    """Write the model folder of a LLaVA-UHD v1 checkpoint folder; `overrides` change the composition.

    A folder without CLIP's weights gets them from `experts.clip.pretrained`, OpenAI's own by default.
    allow_bin: read pickled weights where there are no .safetensors.

    Raises CheckpointError where config.json is not LLaVA-UHD's, WeightsError where weights and composition differ,
    FileExistsError where there is something at `output` already.
    """
    refuse_existing(output)
    config = composition(source, overrides)

    def by_our_names(state: Weights, model: MoeVisionForConditionalGeneration) -> dict[str, torch.Tensor]:
        projector = resampler_weights(under(state, PROJECTOR), str(source))
        return {
            **clip_weights(under(state, TOWER), config, model, source),
            **{f"model.multi_modal_projector.overview.{key}": value for key, value in projector.items()},
            **{language_key(k): value for k, value in state.items() if not k.startswith((TOWER, PROJECTOR))},
        }

    return assemble(config, Source(source, "llava-uhd", allow_bin), output, by_our_names)


def composition(source: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The model config of a LLaVA-UHD folder's config.json. Raises CheckpointError for what its v1 never had."""
    published, path = published_config(source, "a LLaVA-UHD"), source / "config.json"
    projector = published.get("mm_projector_type")
    if projector not in QUERIES_OF_PROJECTORS:
        known = ", ".join(QUERIES_OF_PROJECTORS)
        raise CheckpointError(
            f"{path}: mm_projector_type is {projector!r}, which is no resampler of LLaVA-UHD v1 (known: {known})"
        )
    variant = clip_variant(published, path)
    check_settings(
        published, path, "LLaVA-UHD v1",
        {
            "model_type": ("llava_llama", "llava", "llama"), "mm_vision_select_feature": ("patch",),
            "mm_use_im_start_end": (False,),
        },
    )  # fmt: skip
    values = read_yaml(packaged_config("model/llava-uhd-144.yaml"))
    # Selected among all hidden states, of which the last layer's is one: -2 leaves one layer out.
    layer = int(published.get("mm_vision_select_layer", -2))
    values["experts"]["clip"] |= {"variant": variant, "layer": layer}
    adapter = values["branches"]["overview"]["adapter"]
    adapter |= {"num_queries": QUERIES_OF_PROJECTORS[projector], "align": "reference"}
    values["language_model"] |= llama_values(source, published)
    for override in overrides:
        values = apply_override(values, override)
    return validate(ModelConfig, values, source=str(path))
