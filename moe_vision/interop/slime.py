"""SliME's checkpoint folders (yfzhang114/SliME, `LlavaLlamaForCausalLM`) → ours.

Key names are those of the published classes: CLIP under `model.vision_tower.vision_tower`, where the folder has it at
all; the gated mixture under `model.mm_projector`; the compressor of tiles under `model.sampler.post_qformer`; the rest
is transformers' Llama.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.experts.weights import WeightsError
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
    published_tokenizer,
    refuse_existing,
    resampler_weights,
    under,
)
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.model_config import ModelConfig, packaged_config

TOWER, PROJECTOR, SAMPLER = "model.vision_tower.vision_tower.", "model.mm_projector.", "model.sampler."
ONLY = {-1: None, 0: "mlp", 1: "resampler"}
"""Our `only` of the gated mixture for each published `mm_learnable_gated`."""


def import_slime(source: Path, output: Path, overrides: Sequence[str] = (), allow_bin: bool = False) -> Path:
    """Write the model folder of a SliME checkpoint folder; `overrides` change the composition.

    A folder without CLIP's weights gets them from `experts.clip.pretrained`, OpenAI's own by default.
    allow_bin: read pickled weights where there are no .safetensors.

    Raises CheckpointError where config.json is not SliME's, WeightsError where weights and composition differ,
    FileExistsError where there is something at `output` already.
    """
    refuse_existing(output)
    config = composition(source, overrides)

    def by_our_names(state: Weights, model: MoeVisionForConditionalGeneration) -> dict[str, torch.Tensor]:
        found = clip_weights(under(state, TOWER), config, model, source)
        mixture: Any = config.branches.overview.adapter
        parts = mixture_weights(under(state, PROJECTOR), mixture, str(source))
        found |= {f"model.multi_modal_projector.overview.{key}": value for key, value in parts.items()}
        parts = compressor_weights(under(state, SAMPLER), str(source))
        found |= {f"model.multi_modal_projector.slices.{key}": value for key, value in parts.items()}
        rest = {key: value for key, value in state.items() if not key.startswith((TOWER, PROJECTOR, SAMPLER))}
        return found | {language_key(key): value for key, value in rest.items()}

    return assemble(config, Source(source, "slime", allow_bin), output, by_our_names)


def composition(source: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The model config of a SliME folder's config.json. Raises CheckpointError for what SliME never released."""
    published, path = published_config(source, "a SliME"), source / "config.json"
    check_settings(
        published, path, "SliME",
        {
            "model_type": ("llava_llama", "llava", "llama"), "mm_projector_type": ("gated",),
            "mm_resampler_type": ("cosine",), "mm_patch_merge_type": ("spatial",), "image_aspect_ratio": ("anyres",),
            "mm_vision_select_feature": ("patch",), "use_local_only": (False,), "use_global_only": (False,),
            "mm_use_im_start_end": (False,), "mm_learnable_gated": tuple(ONLY),
        },
    )  # fmt: skip
    values = read_yaml(packaged_config("model/slime.yaml"))
    layer = int(published.get("mm_vision_select_layer", -2))
    values["experts"]["clip"] |= {"variant": clip_variant(published, path), "layer": layer}
    # The published noise takes its size from the gate; an imported mixture that trains on does the same.
    only = ONLY[published.get("mm_learnable_gated", -1)]
    values["branches"]["overview"]["adapter"] |= {"only": only, "published_noise": True, "half_positions": True}
    queries = int(published.get("mm_resampler_dim", 144))
    values["branches"]["slices"]["adapter"] |= {"num_queries": queries, "half_positions": True}
    values["branches"]["selector"] = {
        "type": "published",
        "top_p": float(published.get("mm_resampler_topp", 0.95)),
        "temperature": float(published.get("mm_resampler_temp", 1.0)),
        # The code that was public when the checkpoints came out.
        "double_softmax": True,
    }
    values["language_model"] |= llama_values(source, published)
    for override in overrides:
        values = apply_override(values, override)
    config = validate(ModelConfig, values, source=str(path))
    check_separator(config, published, source)
    return config


def check_separator(config: ModelConfig, published: dict[str, Any], source: Path) -> None:
    """Raises CheckpointError where the folder's tokenizer does not make the token that config.json separates with."""
    wanted = published.get("seperator")
    if wanted is None:
        return
    slicing: Any = config.slicing
    tokenizer = published_tokenizer(source, config)
    found = tokenizer(slicing.separator, add_special_tokens=False)["input_ids"][-1]
    if found != wanted:
        raise CheckpointError(
            f"{source / 'config.json'}: seperator is token {wanted} ({tokenizer.decode([wanted])!r}), and "
            f"{slicing.separator!r} is {found} in the folder's tokenizer: give slicing.separator=TEXT"
        )


def mixture_weights(state: Weights, config: Any, source: str) -> dict[str, torch.Tensor]:
    """Weights of the gated mixture by our names. `w_noise`, which nothing published reads, comes only where it is used.

    Raises WeightsError for missing ones.
    """
    wanted = ["projection.0", "projection.2", *([] if config.only == "mlp" else ["attn"])]
    if config.only is None:
        wanted += ["w_gate", *(["w_noise"] if config.noise and not config.published_noise else [])]
    if missing := [name for name in wanted if not any(key == name or key.startswith(f"{name}.") for key in state)]:
        raise WeightsError(f"weights in '{source}' lack {missing} of the gated mixture: fetch the folder again")
    found = {f"projection.layers.{key}": value for key, value in under(state, "projection.").items()}
    if "attn" in wanted:
        attention = resampler_weights(under(state, "attn."), source, projects=False)
        found |= {f"resampler.{key}": value for key, value in attention.items()}
    names = {"w_gate": "gate", "w_noise": "noise"}
    return found | {ours: state[theirs] for theirs, ours in names.items() if theirs in wanted}


def compressor_weights(state: Weights, source: str) -> dict[str, torch.Tensor]:
    """Weights of the compressor of tiles by our names. Raises WeightsError for missing ones."""
    weights = resampler_weights(under(state, "post_qformer."), source, projects=False)
    return {f"resampler.{key}": value for key, value in weights.items()}
