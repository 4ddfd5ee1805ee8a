"""Eagle's checkpoint folders (NVlabs/Eagle, `eagle_llama`) → a fused model folder of ours.

Key names are those of the published classes: experts under `model.vision_tower.vision_towers.N.vision_tower`, in the
order of `mm_vision_tower`; the projector under `model.mm_projector`; the rest is transformers' Llama.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.experts.weights import WeightsError, fitted
from moe_vision.interop.checkpoint import (
    CheckpointError,
    Source,
    Weights,
    assemble,
    check_settings,
    language_key,
    llama_values,
    published_config,
    refuse_existing,
)
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.model_config import ModelConfig, packaged_config

EXPERTS_OF_TOWERS = {
    "clip-448": "clip",
    "convnext-1024": "convnext",
    "sam-1024": "sam",
    "det-1024": "eva02",
    "pix2struct-1024": "pix2struct",
}
"""Our expert for each name of Eagle's `mm_vision_tower`."""

TOWER_KEY = re.compile(r"^(?:model\.vision_tower\.)?vision_towers\.(\d+)\.vision_tower\.(.+)$")


def import_eagle(source: Path, output: Path, overrides: Sequence[str] = (), allow_bin: bool = False) -> Path:
    """Write the model folder of an Eagle-X4 or X5 checkpoint folder; `overrides` change the composition.

    allow_bin: read pickled weights where there are no .safetensors.

    Raises CheckpointError where config.json is not Eagle's, WeightsError where weights and composition differ,
    FileExistsError where there is something at `output` already.
    """
    refuse_existing(output)

    def by_our_names(state: Weights, model: MoeVisionForConditionalGeneration) -> dict[str, torch.Tensor]:
        found = expert_weights(state, model.model.vision_tower.experts, str(source))
        return found | {our_key(key): value for key, value in state.items() if not TOWER_KEY.match(key)}

    return assemble(composition(source, overrides), Source(source, "eagle", allow_bin), output, by_our_names)


def composition(source: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The model config of an Eagle folder's config.json. Raises CheckpointError for what Eagle never had."""
    published, path = published_config(source, "an Eagle"), source / "config.json"
    check_settings(published, path, "Eagle", {"model_type": ("eagle_llama", "llava_llama", "llama")})
    towers = str(published.get("mm_vision_tower", "")).split(";")
    unknown = [name for name in towers if name not in EXPERTS_OF_TOWERS]
    if unknown:
        known = ";".join(EXPERTS_OF_TOWERS)
        raise CheckpointError(f"{path}: mm_vision_tower holds {unknown}, which is no tower of Eagle's (known: {known})")
    for key, value in (("mm_projector_type", "mlp2x_gelu"), ("mm_use_im_start_end", False)):
        if published.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {published[key]!r}; Eagle's released checkpoints have {value!r}")
    values = read_yaml(packaged_config("model/eagle-x5-released.yaml"))
    names = [EXPERTS_OF_TOWERS[tower] for tower in towers]
    values["experts"] = {name: {**values["experts"][name], "pretrained": None} for name in names}
    mixer = values["branches"]["overview"]["mixer"]
    mixer["resample"] = {name: method for name, method in mixer["resample"].items() if name in names}
    values["language_model"] |= llama_values(source, published)
    # Fine-tuning padded, pre-training cropped: `image_aspect_ratio` says which of them made this folder.
    fit = "pad" if published.get("image_aspect_ratio", "square") == "pad" else "crop"
    values["slicing"] = {**values["slicing"], "fit": fit}
    for override in overrides:
        values = apply_override(values, override)
    return validate(ModelConfig, values, source=str(path))


def expert_weights(
    state: Weights, experts: Mapping[str, Any] | torch.nn.ModuleDict, source: str
) -> dict[str, torch.Tensor]:
    """Weights of every expert by our names, from Eagle's numbered towers in the same order."""
    towers: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if match := TOWER_KEY.match(key):
            towers.setdefault(int(match[1]), {})[match[2]] = value
    if sorted(towers) != list(range(len(experts))):
        raise WeightsError(f"weights in '{source}' hold {len(towers)} towers for {len(experts)} experts")
    return {
        f"model.vision_tower.experts.{name}.model.{key}": value
        for i, (name, expert) in enumerate(experts.items())
        for key, value in fitted(expert, towers[i], f"{source}, tower {i}").items()
    }


def our_key(key: str) -> str:
    """Our name of one of Eagle's keys outside the towers."""
    if key.startswith("model.mm_projector."):
        return key.replace("model.mm_projector.", "model.multi_modal_projector.overview.layers.")
    return language_key(key)
