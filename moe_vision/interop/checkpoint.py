"""What folders that LLaVA's descendants published have in common: a flat config.json, a Llama, pieces of text.

config.json ─ published_config() ─ a composition ─ ModelConfig ─┐
*.safetensors | *.bin ─ published_weights() ─ by our names ─────┴─ assemble() ─ OUTPUT
tokenizer.json | tokenizer.model ─ prompts.py ──────────────────┘
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moe_vision.experts.shards import listed, read_files, weight_files
from moe_vision.experts.weight_values import StoredWeights, WeightsError, check_values, may_be_zero, origin
from moe_vision.experts.weights import fitted, resolve
from moe_vision.interop.prompts import CheckpointError, prompt_template
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.chat_rendering import end_of_turn_ids
from moe_vision.modeling.compose import (
    chat_template_of,
    fit_vocabulary,
    load_tokenizer,
    make_processor,
    marker_ids,
    question_turns,
    save,
)
from moe_vision.modeling.generation_defaults import generation_config_of
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.modeling.model_files import read_object

Weights = Mapping[str, torch.Tensor]

VARIANTS_OF_TOWERS = {
    "clip-vit-large-patch14-336": "vit_large_patch14_336",
    "clip-vit-large-patch14": "vit_large_patch14_224",
}
"""Our variant of CLIP for each last part of `mm_vision_tower`, which is a Hub id or a folder of its authors'."""


OTHER_MODELS_FIELDS = {
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": None, "qk_norm": False,
    "use_qk_norm": False, "clip_qkv": None, "logit_scale": 1, "logits_scaling": 1, "embedding_multiplier": 1,
    "residual_multiplier": 1, "attention_multiplier": None, "scale_emb": 1, "scale_depth": None, "dim_model_base": None,
    "num_experts": None, "num_local_experts": None, "layer_types": None, "no_rope_layers": None, "alibi": False,
    "parallel_attn": False, "use_parallel_residual": False, "quantization_config": None, "use_sliding_window": False,
    "sliding_window": None,
}  # fmt: skip
"""Settings of a config.json that transformers' Llama does not read and that change what a model computes, each with the
value at which it changes nothing."""

ROTARY_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings")

TRAINED_ONLY = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
"""Fields of a published config that are not the language model's own."""


@dataclass(frozen=True)
class Source:
    """What an import reads. folder: of a checkpoint of `system` (`eagle`, `slime`, `llava-uhd`).

    allow_bin: whether weights may come from pickles, where the folder has no .safetensors.
    """

    folder: Path
    system: str
    allow_bin: bool = False


def refuse_existing(output: Path) -> None:
    """Raises FileExistsError, before any work, where there is something already."""
    if output.exists():
        raise FileExistsError(f"output '{output}' exists: give another folder, or remove it")


def published_config(source: Path, system: str) -> dict[str, Any]:
    """Plain values of a folder's config.json. Raises CheckpointError where there is none,
    ModelFilesError where it is broken.
    """
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"'{source}' has no config.json: give the folder of {system} checkpoint")
    return read_object(path)


def llama_values(source: Path, published: Mapping[str, Any]) -> dict[str, Any]:
    """The `language_model` of a composition whose Llama's settings are at the top of config.json.

    Rotary settings of any age (`rope_theta`, `rope_scaling`, `partial_rotary_factor`, `rope_parameters`) become
    transformers' `rope_parameters` by its own rules. Raises CheckpointError for settings that Llama does not have.
    """
    path = source / "config.json"
    for key, neutral in OTHER_MODELS_FIELDS.items():
        value = published.get(key, neutral)
        if key == "sliding_window" and not published.get("use_sliding_window", True):
            continue
        if value != neutral and value is not None:
            raise CheckpointError(
                f"{path}: {key} is {value!r}, which transformers' Llama does not compute: only checkpoints of Llama, "
                f"Vicuna and Yi can be imported, with {key} {neutral!r} or absent"
            )
    own = copy.deepcopy({key: value for key, value in published.items() if key not in TRAINED_ONLY})
    try:
        config = LlamaConfig(**own)
    except Exception as error:  # the library raises its own kinds, KeyError and TypeError among them
        raise CheckpointError(f"{path}: transformers' LlamaConfig refuses these settings ({error})") from error
    check_rotary(config, published, path)
    rotary: Any = config.rope_parameters
    known_fields = set(LlamaConfig().to_dict()) - TRAINED_ONLY
    architecture = {key: value for key, value in config.to_dict().items() if key in known_fields and key in published}
    return {
        "pretrained": None,
        "tokenizer": str(source),
        "image_token": "<image>",
        "chat_template": None,
        "architecture": {"model_type": "llama", **architecture, "rope_parameters": rotary},
    }


def check_rotary(config: LlamaConfig, published: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for rotary settings that transformers' Llama cannot compute with."""
    given = {key: published[key] for key in ROTARY_FIELDS if key in published}
    try:
        frequencies = LlamaRotaryEmbedding(config).inv_freq
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {given} are no rotary settings of transformers' Llama ({error!r})") from error
    if not bool(frequencies.isfinite().all()):
        raise CheckpointError(f"{path}: {given} give rotary frequencies that are not finite: fetch config.json again")


def check_settings(
    published: Mapping[str, Any], path: Path, system: str, allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raises CheckpointError for a setting that the system's checkpoints never had; one that is missing passes."""
    for key, values in allowed.items():
        if published.get(key, values[0]) not in values:
            raise CheckpointError(f"{path}: {key} is {published[key]!r}, which {system} never had: only {values}")


def clip_variant(published: Mapping[str, Any], path: Path) -> str:
    """Our variant of the CLIP that config.json names. Raises CheckpointError for another tower."""
    tower = Path(str(published.get("mm_vision_tower", ""))).name
    if tower not in VARIANTS_OF_TOWERS:
        known = ", ".join(VARIANTS_OF_TOWERS)
        raise CheckpointError(f"{path}: mm_vision_tower ends with '{tower}', which is no CLIP known here ({known})")
    return VARIANTS_OF_TOWERS[tower]


def under(state: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def clip_weights(
    tower: Weights, config: ModelConfig, model: MoeVisionForConditionalGeneration, source: Path
) -> dict[str, torch.Tensor]:
    """CLIP's weights by our names: the folder's, or those that `experts.clip.pretrained` names where it has none.

    Raises WeightsError where there are none, or where they do not fit.
    """
    expert: Any = model.model.vision_tower.experts["clip"]
    origin = f"{source}, CLIP"
    if not tower:
        pretrained = config.experts["clip"].pretrained
        if pretrained is None:
            raise WeightsError(f"'{source}' holds no CLIP: give experts.clip.pretrained, a Hub id or a folder")
        origin = str(expert.config.spec.hub_id if pretrained == "default" else pretrained)
        tower = read_files(resolve(origin, expert.config.spec))
    return {f"model.vision_tower.experts.clip.model.{k}": v for k, v in fitted(expert, tower, origin).items()}


def published_weights(source: Source) -> StoredWeights:
    """Every tensor of a folder by its published name, without the rotary tables that old Llamas saved.

    Raises CheckpointError where there is none, or only pickles that nobody allowed; WeightsError as `weight_files`.
    """
    files = weight_files(source.folder, (".safetensors",))
    if files is None:
        pickles = sorted(path.name for path in source.folder.glob("pytorch_model*.bin*"))
        if not pickles:
            raise CheckpointError(
                f"'{source.folder}' holds neither *.safetensors nor pytorch_model*.bin: give a whole checkpoint"
            )
        if not source.allow_bin:
            raise CheckpointError(
                f"'{source.folder}' holds its weights as pickles ({listed(pickles)}) and has no .safetensors: a pickle "
                "can run code. If you trust its source, add --allow-bin (it is read with weights_only=True)"
            )
        files = weight_files(source.folder, (".bin",))
    assert files is not None
    state = read_files(files)
    for key in [key for key in state if key.endswith("rotary_emb.inv_freq")]:
        del state[key]
    return state


def assemble(
    config: ModelConfig,
    source: Source,
    output: Path,
    by_our_names: Callable[[Weights, MoeVisionForConditionalGeneration], dict[str, torch.Tensor]],
) -> Path:
    """Write the model folder of a composition with a published folder's weights and tokenizer, in their dtype.

    by_our_names: renames the published tensors for a model that is built on the meta device. Raises WeightsError where
    weights and composition differ, CheckpointError where the folder's tokenizer is not that of its system.
    """
    tokenizer = published_tokenizer(source.folder, config)
    tokenizer.chat_template = prompt_template(source.system, config.language_model, tokenizer)
    config = with_template_of_tokenizer(config)
    image_token_id: Any = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    hf_config = config.hf_config(image_token_id, marker_ids(config, tokenizer), question_turns(config, tokenizer))
    with torch.device("meta"):
        model = MoeVisionForConditionalGeneration(hf_config)
    stops = end_of_turn_ids(tokenizer, chat_template_of(config, tokenizer))
    generation = generation_config_of(str(source.folder), hf_config.text_config, tokenizer, image_token_id, stops)
    published = published_weights(source)
    found = by_our_names(published, model)
    embedding = found.get(f"{LANGUAGE_MODEL}embed_tokens.weight")
    if model.config.text_config.tie_word_embeddings and embedding is not None:
        found.setdefault("lm_head.weight", embedding)
    check_weights(found, model, source.folder)
    check_published_values(found, model, source.folder, published)
    dtype = saved_dtype(published_config(source.folder, source.system), found, source.folder / "config.json")
    model.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}, assign=True)
    model.tie_weights()
    fit_vocabulary(model, tokenizer)
    model.generation_config = generation
    save(model, make_processor(config, hf_config, tokenizer), output)
    return output


def published_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The tokenizer of a folder. Its config.json, of a model that transformers does not have, is left unread."""
    return load_tokenizer(str(folder), config.language_model.image_token, config=LlamaConfig())


def with_template_of_tokenizer(config: ModelConfig) -> ModelConfig:
    """The composition that takes its chat template from the tokenizer."""
    language = config.language_model.model_copy(update={"chat_template": None})
    return config.model_copy(update={"language_model": language})


def saved_dtype(published: Mapping[str, Any], found: Weights, path: Path) -> torch.dtype:
    """The dtype that config.json names, or else that of the embedding: what transformers loads the folder in.

    Raises CheckpointError for a name that is no floating dtype.
    """
    name = published.get("torch_dtype", published.get("dtype"))
    if name is None:
        return found[f"{LANGUAGE_MODEL}embed_tokens.weight"].dtype
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{path}: torch_dtype is {name!r}: give float32, float16 or bfloat16")
    return dtype


LANGUAGE_MODEL = "model.language_model."


def check_weights(found: Weights, model: MoeVisionForConditionalGeneration, source: Path) -> None:
    """Raises WeightsError naming what differs between weights by our names and the model."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsError(
            f"weights in '{source}' do not fit its config.json: missing {listed(missing)}; unexpected "
            f"{listed(unexpected)}; shapes {listed(misshapen)}. Fetch the folder again, or give overrides that fit it"
        )


def check_published_values(
    found: Weights, model: MoeVisionForConditionalGeneration, source: Path, published: Weights
) -> None:
    """Raises WeightsError naming the file and the tensor where weights are unusable, see `check_values`."""
    wanted = model.state_dict()
    floating = {key: value for key, value in found.items() if wanted[key].is_floating_point()}
    check_values(
        floating,
        lambda key: may_be_zero(key, wanted[key]),
        lambda key: origin(found[key], key, str(source), published),
    )


def language_key(key: str) -> str:
    """Our name of one of the language model's published keys."""
    return re.sub(r"^model\.", LANGUAGE_MODEL, key)


def resampler_weights(state: Weights, source: str, projects: bool = True) -> dict[str, torch.Tensor]:
    """Weights of either resampler by our names, from those of the published class, which joins three projections.

    Its fixed `pos_embed` is computed here, and its keys' bias has no effect. projects: whether it projects before and
    behind the attention, as LLaVA-UHD's does and SliME's does not. Raises WeightsError for missing ones.
    """
    names = {
        "query": "query", "attn.out_proj.weight": "out_proj.weight", "attn.out_proj.bias": "out_proj.bias",
    }  # fmt: skip
    if projects:
        names["kv_proj.weight"] = "input_proj.weight"
    for theirs, ours in (("ln_q", "query_norm"), ("ln_kv", "input_norm"), ("ln_post", "output_norm")):
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    wanted = {*names, "attn.in_proj_weight", "attn.in_proj_bias", *(["proj"] if projects else [])}
    if missing := sorted(wanted - state.keys()):
        raise WeightsError(f"weights in '{source}' lack {missing} of the resampler: fetch the folder again")
    found = {ours: state[theirs] for theirs, ours in names.items()}
    if projects:
        found["output_proj.weight"] = state["proj"].T.contiguous()
    weights, biases = state["attn.in_proj_weight"].chunk(3), state["attn.in_proj_bias"].chunk(3)
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        found[f"{name}.weight"] = weight.clone()
    found |= {"q_proj.bias": biases[0].clone(), "v_proj.bias": biases[2].clone()}
    return found
