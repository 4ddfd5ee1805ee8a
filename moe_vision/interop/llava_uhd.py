"""LLaVA-UHD's checkpoint folders (thunlp/LLaVA-UHD, branch LLaVA-UHD-v1, `LlavaLlamaForCausalLM`) → ours.

Key names are those of the published classes: CLIP under `model.vision_tower.vision_tower`, where the folder has it at
all; the resampler under `model.mm_projector`; the rest is transformers' Llama. The published evaluation enlarged some
images to 1024 pixels first; here a plan depends on the image alone.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.experts.weights import WeightsError, fitted, read_state_dict, resolve
from moe_vision.interop.checkpoint import (
    CheckpointError,
    Weights,
    assemble,
    language_key,
    llama_values,
    published_config,
    refuse_existing,
)
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.model_config import ModelConfig, packaged_config

QUERIES_OF_PROJECTORS = {"adapt_spatial_resampler": 144, "adapt_spatial_resampler_v1": 144, "uhd_v1_query64": 64}
"""Queries of each published name of the resampler that attends to cells; the later two are from branches v2 and v3."""

VARIANTS_OF_TOWERS = {
    "clip-vit-large-patch14-336": "vit_large_patch14_336",
    "clip-vit-large-patch14": "vit_large_patch14_224",
}
"""Our variant of CLIP for each last part of `mm_vision_tower`, which is a Hub id or a folder of its authors'."""

TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."


def import_llava_uhd(source: Path, output: Path, overrides: Sequence[str] = ()) -> Path:
    """Write the model folder of a LLaVA-UHD v1 checkpoint folder; `overrides` change the composition.

    A folder without CLIP's weights gets them from `experts.clip.pretrained`, OpenAI's own by default. Raises
    CheckpointError where config.json is not LLaVA-UHD's, WeightsError where weights and composition differ,
    FileExistsError where there is something at `output` already.
    """
    refuse_existing(output)
    config = composition(source, overrides)

    def by_our_names(state: Weights, model: MoeVisionForConditionalGeneration) -> dict[str, torch.Tensor]:
        expert = model.model.vision_tower.experts["clip"]
        tower = {key.removeprefix(TOWER): value for key, value in state.items() if key.startswith(TOWER)}
        origin = f"{source}, CLIP"
        if not tower:
            pretrained = config.experts["clip"].pretrained
            if pretrained is None:
                raise WeightsError(f"'{source}' holds no CLIP: give experts.clip.pretrained, a Hub id or a folder")
            origin = str(expert.config.spec.hub_id if pretrained == "default" else pretrained)
            tower = read_state_dict(resolve(origin, expert.config.spec))
        projector = {key.removeprefix(PROJECTOR): value for key, value in state.items() if key.startswith(PROJECTOR)}
        return {
            **{f"model.vision_tower.experts.clip.model.{k}": v for k, v in fitted(expert, tower, origin).items()},
            **{
                f"model.multi_modal_projector.overview.{key}": value
                for key, value in resampler_weights(projector, str(source)).items()
            },
            **{language_key(k): value for k, value in state.items() if not k.startswith((TOWER, PROJECTOR))},
        }

    return assemble(config, source, output, by_our_names)


def composition(source: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The model config of a LLaVA-UHD folder's config.json. Raises CheckpointError for what its v1 never had."""
    published, path = published_config(source, "a LLaVA-UHD"), source / "config.json"
    projector = published.get("mm_projector_type")
    if projector not in QUERIES_OF_PROJECTORS:
        known = ", ".join(QUERIES_OF_PROJECTORS)
        raise CheckpointError(
            f"{path}: mm_projector_type is {projector!r}, which is no resampler of LLaVA-UHD v1 (known: {known})"
        )
    tower = Path(str(published.get("mm_vision_tower", ""))).name
    if tower not in VARIANTS_OF_TOWERS:
        known = ", ".join(VARIANTS_OF_TOWERS)
        raise CheckpointError(f"{path}: mm_vision_tower ends with '{tower}', which is no CLIP known here ({known})")
    for key, value in (
        ("model_type", ("llava_llama", "llava", "llama")),
        ("mm_vision_select_feature", ("patch",)),
        ("mm_use_im_start_end", (False,)),
    ):
        if published.get(key, value[0]) not in value:
            raise CheckpointError(f"{path}: {key} is {published[key]!r}, which LLaVA-UHD v1 never had: only {value}")
    values = read_yaml(packaged_config("model/llava-uhd-144.yaml"))
    # Selected among all hidden states, of which the last layer's is one: -2 leaves one layer out.
    layer = int(published.get("mm_vision_select_layer", -2))
    values["experts"]["clip"] |= {"variant": VARIANTS_OF_TOWERS[tower], "layer": layer}
    adapter = values["branches"]["overview"]["adapter"]
    adapter |= {"num_queries": QUERIES_OF_PROJECTORS[projector], "align": "reference"}
    values["language_model"] |= llama_values(source, published)
    for override in overrides:
        values = apply_override(values, override)
    return validate(ModelConfig, values, source=str(path))


def resampler_weights(state: Weights, source: str) -> dict[str, torch.Tensor]:
    """Weights of either resampler by our names, from those of the published class, which joins three projections.

    Its fixed `pos_embed` is computed here, and its keys' bias has no effect. Raises WeightsError for missing ones.
    """
    names = {
        "query": "query", "kv_proj.weight": "input_proj.weight", "attn.out_proj.weight": "out_proj.weight",
        "attn.out_proj.bias": "out_proj.bias",
    }  # fmt: skip
    for theirs, ours in (("ln_q", "query_norm"), ("ln_kv", "input_norm"), ("ln_post", "output_norm")):
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    wanted = {*names, "proj", "attn.in_proj_weight", "attn.in_proj_bias"}
    if missing := sorted(wanted - state.keys()):
        raise WeightsError(f"weights in '{source}' lack {missing} of the resampler: fetch the folder again")
    found = {ours: state[theirs] for theirs, ours in names.items()}
    found["output_proj.weight"] = state["proj"].T.contiguous()
    weights, biases = state["attn.in_proj_weight"].chunk(3), state["attn.in_proj_bias"].chunk(3)
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        found[f"{name}.weight"] = weight.clone()
    found |= {"q_proj.bias": biases[0].clone(), "v_proj.bias": biases[2].clone()}
    return found
