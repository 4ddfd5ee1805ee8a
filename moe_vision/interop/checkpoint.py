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

from moe_vision.experts.weights import WeightsError, listed, read_state_dict
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import load_tokenizer, make_processor, marker_ids, question_turns, save
from moe_vision.modeling.model_config import ModelConfig

Weights = Mapping[str, torch.Tensor]


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
    found = by_our_names(published_weights(source), model)
    check_weights(found, model, source)
    model.load_state_dict(found, assign=True)
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
