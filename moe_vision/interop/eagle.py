"""Eagle's checkpoint folders (NVlabs/Eagle, `eagle_llama`) → a fused model folder of ours.

config.json ─ composition() ─ ModelConfig ─┐
*.safetensors | *.bin ─ published_weights() ┴─ model, processor ─ save() ─ OUTPUT

Key names are those of the published classes: experts under `model.vision_tower.vision_towers.N.vision_tower`, in the
order of `mm_vision_tower`; the projector under `model.mm_projector`; the rest is transformers' Llama.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.experts.weights import WeightsError, fitted, listed, read_state_dict
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import load_tokenizer, make_processor, save
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


class CheckpointError(ValueError):
    """A folder that is no checkpoint of the system it should be brought in from."""


def import_eagle(source: Path, output: Path, overrides: Sequence[str] = ()) -> Path:
    """Write the model folder of an Eagle-X4 or X5 checkpoint folder; `overrides` change the composition.

    Raises CheckpointError where config.json is not Eagle's, WeightsError where weights and composition differ,
    FileExistsError where there is something at `output` already.
    """
    if output.exists():
        raise FileExistsError(f"output '{output}' exists: give another folder, or remove it")
    config = composition(source, overrides)
    tokenizer = load_tokenizer(str(source), config.language_model.image_token)
    template = config.language_model.template() or tokenizer.chat_template
    if template is None:
        raise CheckpointError(f"'{source}' has no chat template: give language_model.chat_template=vicuna_v1")
    if space := gap(tokenizer):
        template = template.replace("set gap = ''", f"set gap = '{space}'")
    image_token_id: Any = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    hf_config = config.hf_config(image_token_id)
    with torch.device("meta"):
        model = MoeVisionForConditionalGeneration(hf_config)
    model.load_state_dict(published_weights(source, model), assign=True)
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    # The placeholder is new to the language model, which has not learnt not to say it.
    model.generation_config.suppress_tokens = [image_token_id]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = make_processor(config, hf_config, tokenizer)
    processor.chat_template = template
    save(model, processor, output)
    return output


def composition(source: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The model config of an Eagle folder's config.json. Raises CheckpointError for what Eagle never had."""
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"'{source}' has no config.json: give the folder of an Eagle checkpoint")
    published = json.loads(path.read_text(encoding="utf-8"))
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
    known_fields = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    architecture = {key: value for key, value in published.items() if key in known_fields}
    values["language_model"] |= {
        "pretrained": None,
        "tokenizer": str(source),
        "image_token": "<image>",
        "architecture": {"model_type": "llama", **architecture},
    }
    # Fine-tuning padded, pre-training cropped: `image_aspect_ratio` says which of them made this folder.
    fit = "pad" if published.get("image_aspect_ratio", "square") == "pad" else "crop"
    values["slicing"] = {**values["slicing"], "fit": fit}
    for override in overrides:
        values = apply_override(values, override)
    return validate(ModelConfig, values, source=str(path))


def published_weights(source: Path, model: MoeVisionForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All weights of an Eagle folder by our names, checked against `model`. Raises WeightsError naming what differs."""
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"'{source}' holds neither *.safetensors nor pytorch_model*.bin: give a whole checkpoint")
    state = read_state_dict(files)
    found = expert_weights(state, model.model.vision_tower.experts, str(source))
    for key, value in state.items():
        if not TOWER_KEY.match(key):
            found[our_key(key)] = value
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
    return found


def expert_weights(
    state: Mapping[str, torch.Tensor], experts: Mapping[str, Any] | torch.nn.ModuleDict, source: str
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
    return re.sub(r"^model\.", "model.language_model.", key)


def gap(tokenizer: Any) -> str:
    """What a prompt must hold behind BOS and images, so that text is tokenised as Eagle does: piece by piece.

    Eagle's pieces each begin a text; a tokenizer that puts its leading space before the first word of a whole text
    only needs one written there. Raises CheckpointError where neither a space nor nothing gives Eagle's tokens.
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
        f"'{tokenizer.name_or_path}': its tokenizer does not make {expected} of {image.join(pieces)!r}, as Eagle's "
        "does: fetch tokenizer.model and tokenizer_config.json of the checkpoint again"
    )
