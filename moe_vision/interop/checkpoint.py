"""What folders that LLaVA's descendants published have in common: a flat config.json, a Llama, pieces of text.

config.json ─ published_config() ─ a composition ─ ModelConfig ─┐
*.safetensors | *.bin ─ published_weights() ─ by our names ─────┴─ assemble() ─ OUTPUT
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from moe_vision.experts.weight_values import check_values, may_be_zero, origin
from moe_vision.experts.weights import WeightsError, fitted, listed, read_state_dict, resolve
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import (
    fit_vocabulary,
    load_tokenizer,
    make_processor,
    marker_ids,
    question_turns,
    save,
)
from moe_vision.modeling.generation_defaults import generation_config_of
from moe_vision.modeling.model_config import ModelConfig

Weights = Mapping[str, torch.Tensor]

VARIANTS_OF_TOWERS = {
    "clip-vit-large-patch14-336": "vit_large_patch14_336",
    "clip-vit-large-patch14": "vit_large_patch14_224",
}
"""Our variant of CLIP for each last part of `mm_vision_tower`, which is a Hub id or a folder of its authors'."""


class CheckpointError(ValueError):
    """A folder that is no checkpoint of the system it should be brought in from."""


def refuse_existing(output: Path) -> None:
    """Raises FileExistsError, before any work, where there is something already."""
    if output.exists():
        raise FileExistsError(f"output '{output}' exists: give another folder, or remove it")


def published_config(source: Path, system: str) -> dict[str, Any]:
    """Plain values of a folder's config.json. Raises CheckpointError where there is none."""
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"'{source}' has no config.json: give the folder of {system} checkpoint")
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def llama_values(source: Path, published: Mapping[str, Any]) -> dict[str, Any]:
    """The `language_model` of a composition whose Llama's settings lie flat in config.json."""
    known_fields = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    architecture = {key: value for key, value in published.items() if key in known_fields}
    return {
        "pretrained": None,
        "tokenizer": str(source),
        "image_token": "<image>",
        "architecture": {"model_type": "llama", **architecture},
    }


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
        tower = read_state_dict(resolve(origin, expert.config.spec))
    return {f"model.vision_tower.experts.clip.model.{k}": v for k, v in fitted(expert, tower, origin).items()}


def published_weights(source: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its published name. Raises CheckpointError where there is none."""
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"'{source}' holds neither *.safetensors nor pytorch_model*.bin: give a whole checkpoint")
    return read_state_dict(files)


def assemble(
    config: ModelConfig,
    source: Path,
    output: Path,
    by_our_names: Callable[[Weights, MoeVisionForConditionalGeneration], dict[str, torch.Tensor]],
) -> Path:
    """Write the model folder of a composition with a published folder's weights and tokenizer.

    by_our_names: renames the published tensors for a model that is built on the meta device. Raises WeightsError where
    weights and composition differ, CheckpointError where the folder's tokenizer is not that of its system.
    """
    tokenizer = load_tokenizer(str(source), config.language_model.image_token)
    template = config.language_model.template() or tokenizer.chat_template
    if template is None:
        raise CheckpointError(f"'{source}' has no chat template: give language_model.chat_template=vicuna_v1")
    if space := gap(tokenizer):
        template = template.replace("set gap = ''", f"set gap = '{space}'")
    image_token_id: Any = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    hf_config = config.hf_config(image_token_id, marker_ids(config, tokenizer), question_turns(config, tokenizer))
    with torch.device("meta"):
        model = MoeVisionForConditionalGeneration(hf_config)
    published = published_weights(source)
    found = by_our_names(published, model)
    check_weights(found, model, source)
    check_published_values(found, model, source, published)
    model.load_state_dict(found, assign=True)
    fit_vocabulary(model, tokenizer)
    model.generation_config = generation_config_of(str(source), model.config.text_config, tokenizer, image_token_id)
    processor = make_processor(config, hf_config, tokenizer)
    processor.chat_template = template
    save(model, processor, output)
    return output


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
    return re.sub(r"^model\.", "model.language_model.", key)


def gap(tokenizer: Any) -> str:
    """What a prompt must hold behind BOS and images, so that text is tokenised as LLaVA does: piece by piece.

    LLaVA's pieces each begin a text; a tokenizer that puts its leading space before the first word of a whole text
    only needs one written there. Raises CheckpointError where neither a space nor nothing gives LLaVA's tokens.
    """
    begin, image = tokenizer.bos_token or "", tokenizer.image_token
    pieces = ("A chat. USER: ", "\nwhat is it? ASSISTANT:", "\nand this?")
    expected: list[int] = [tokenizer.bos_token_id] if begin else []
    for i, piece in enumerate(pieces):
        expected += [tokenizer.convert_tokens_to_ids(image)] if i else []
        expected += tokenizer(piece, add_special_tokens=False)["input_ids"]
    for space in ("", " "):
        text = begin + space + f"{image}{space}".join(pieces)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == expected:
            return space
    raise CheckpointError(
        f"'{tokenizer.name_or_path}': its tokenizer does not make {expected} of {image.join(pieces)!r}, as LLaVA's "
        "does: fetch tokenizer.model and tokenizer_config.json of the checkpoint again"
    )


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
