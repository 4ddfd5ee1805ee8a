"""Checks of a fused model's folder: each file is what it should be, and all say the same."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig

from moe_vision.files import check_regular
from moe_vision.modeling import (
    MoeVisionConfig,
    MoeVisionForConditionalGeneration,
    MoeVisionImageProcessor,
    MoeVisionProcessor,
)
from moe_vision.modeling.generation_defaults import TOKEN_KEYS, token_ids
from moe_vision.modeling.model_files import ModelFilesError, read_object, reading

OBJECTS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files of a model folder that hold a JSON object, if they are there."""


def check_objects(folder: Path) -> None:
    """Raise ModelFilesError for a JSON file of a model folder that holds anything but an object, and for generation
    defaults that cannot be used."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            check_regular(path, "model file")
    for name in OBJECTS:
        if (folder / name).exists():
            read_object(folder / name)
    path = folder / "generation_config.json"
    if path.exists():
        values = read_object(path)
        for key in TOKEN_KEYS:
            token_ids(values.get(key), key, f"'{path}'")
        with reading(path):
            GenerationConfig.from_dict(values)


def read_skeleton(folder: Path) -> MoeVisionForConditionalGeneration:
    """The model that a folder's config.json describes, on the meta device. Raises ModelFilesError."""
    path = folder / "config.json"
    values = read_object(path)
    if values.get("model_type") != MoeVisionConfig.model_type:
        raise ModelFilesError(
            f"'{path}': model_type is {values.get('model_type')!r} instead of '{MoeVisionConfig.model_type}': give the "
            "output of an ended run, or an export"
        )
    with reading(path), torch.device("meta"):
        return MoeVisionForConditionalGeneration(MoeVisionConfig.from_pretrained(folder))


class InitialZeros:
    """Whether a new model of a config has zeros in a parameter. One is built at the first question: few models that
    have been trained have parameters of zeros.
    """

    def __init__(self, config: MoeVisionConfig) -> None:
        self.config = config
        self.built: dict[bool, MoeVisionForConditionalGeneration] = {}

    def __call__(self, key: str) -> bool:
        whole = "language_model." in key or key.startswith("lm_head")
        if whole not in self.built:
            config = copy.deepcopy(self.config)
            if not whole:  # without the language model, which takes the most memory
                width = config.text_config.hidden_size
                config.text_config = LlamaConfig(
                    vocab_size=8, hidden_size=width, intermediate_size=1, num_hidden_layers=0, num_attention_heads=1
                )
            self.built[whole] = MoeVisionForConditionalGeneration(config)
        return not self.built[whole].get_parameter(key).any()


def load_processor(folder: Path, config: MoeVisionConfig) -> MoeVisionProcessor:
    """The processor of a folder. Raises ModelFilesError if it cannot be read, or contradicts the model's config."""
    with reading(folder / "processor_config.json"):
        MoeVisionImageProcessor.from_pretrained(folder)
    with reading(f"{folder}/tokenizer.json, tokenizer_config.json"):
        processor = MoeVisionProcessor.from_pretrained(folder, trust_remote_code=False)
    check_processor(processor, config, folder)
    return processor


def check_processor(processor: Any, config: MoeVisionConfig, folder: Path) -> None:
    """Raise ModelFilesError naming what a processor does otherwise than its model expects."""
    expected = MoeVisionImageProcessor(slicing=config.vision_config.slicing).to_dict()
    found = processor.image_processor.to_dict()
    name = "processor_config.json" if (folder / "processor_config.json").is_file() else "preprocessor_config.json"
    hint = "restore the file that was changed"
    for key in sorted((expected.keys() | found.keys()) - {"auto_map", "processor_class"}):
        if found.get(key) != expected.get(key):
            raise ModelFilesError(
                f"'{folder / name}': image_processor.{key} is {found.get(key)!r}, and the model of config.json takes "
                f"{expected.get(key)!r}: {hint}"
            )
    if processor.image_token_id != config.image_token_id:
        raise ModelFilesError(
            f"'{folder / 'tokenizer_config.json'}': image_token {processor.image_token!r} has id "
            f"{processor.image_token_id}, and image_token_id in config.json is {config.image_token_id}: {hint}"
        )
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= config.text_config.vocab_size:
        raise ModelFilesError(
            f"'{folder / 'tokenizer.json'}' has token ids up to {largest}, and text_config.vocab_size in config.json "
            f"is {config.text_config.vocab_size}: {hint}"
        )
