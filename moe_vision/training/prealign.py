"""Eagle's pre-alignment (Shi et al., arXiv 2408.15998, section 3.4), whose code was never released.

Each expert trains by itself, with a projector of its own, by next-token prediction under the frozen language model;
the projector is thrown away. What is kept is the expert, in a file that any config takes as `pretrained`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from moe_vision.config import validate
from moe_vision.experts import Expert
from moe_vision.experts.weights import load_expert_weights
from moe_vision.files import give_usual_modes
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.modeling.model_files import reading
from moe_vision.training.checkpoints import sync, writing


def alone(config: ModelConfig, expert: str) -> ModelConfig:
    """The model that an expert is aligned in: it alone on the grid of the fused model's overview, a projector as the
    fused model's overview has, or the usual one of two layers if that is none, and the same language model and slicing.

    Raises ConfigError if the projector does not fit the expert, ValueError if the language model has no weights.
    """
    if config.language_model.pretrained is None:
        raise ValueError(
            "prealign trains experts under a frozen language model, and language_model.pretrained is null: name one "
            "that has been trained, or leave the stage out"
        )
    plain, overview = config.to_plain(), config.branches.overview
    grid = config.vision_config().mixed_shape("overview").grid if config.slicing.one_view else None
    adapter = overview.adapter.to_dict() if overview.adapter.type_name == "mlp" else {"type": "mlp"}
    mixer: dict[str, Any] = {"type": "channel_concat", "grid": None if grid is None else list(grid)}
    if overview.mixer.type_name == "channel_concat":
        mixer = overview.mixer.to_dict()
        mixer["resample"] = {name: how for name, how in mixer["resample"].items() if name == expert}
    values = {
        **plain,
        "experts": {expert: plain["experts"][expert]},
        "branches": {
            "overview": {"mixer": mixer, "adapter": adapter},
            "shared": config.slicing.has_slices,
        },
    }
    if plain["slicing"]["type"] == "none" and plain["slicing"]["size"] is None:
        values["slicing"] = {**plain["slicing"], "size": list(config.vision_config().canvas_size())}
    return validate(ModelConfig, values, source=f"expert '{expert}' alone, as prealign trains it")


def aligned_file(output: Path, expert: str) -> Path:
    """Where a training's aligned expert lies."""
    return output / "experts" / f"{expert}.safetensors"


def digest_of(state: Mapping[str, torch.Tensor]) -> str:
    """XXH3 of tensors by name."""
    digest = xxhash.xxh3_64()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_expert(
    model: MoeVisionForConditionalGeneration, name: str, path: Path, digest: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write one expert's weights, whole or not at all, by the names of its published checkpoint.

    digest: of the config that it was aligned by, which `load_aligned` compares. weights: all of the model's, where they
    had to be gathered from shards. Raises WriteError.
    """
    expert: Any = model.model.vision_tower.experts[name]
    inner, prefix = f"model.vision_tower.experts.{name}.model.", expert.config.spec.key_prefix
    every = model.state_dict() if weights is None else weights
    state = {
        prefix + key.removeprefix(inner): value.detach().cpu().contiguous()
        for key, value in every.items()
        if key.startswith(inner)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with writing(f"expert '{name}'", path.parent):
        save_file(state, temporary, metadata={"format": "pt", "aligned_by": digest, "xxh3": digest_of(state)})
        give_usual_modes(temporary)
        sync(temporary)
        temporary.replace(path)


def load_aligned(model: MoeVisionForConditionalGeneration, name: str, path: Path, digest: str) -> None:
    """Put an aligned expert into a model. Raises ValueError if another config aligned it, WeightsError if it does not
    fit."""
    with reading(path), safe_open(path, framework="pt") as file:
        noted = file.metadata() or {}
        whole = noted.get("xxh3") == digest_of({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    found = noted.get("aligned_by")
    if found != digest:
        raise ValueError(
            f"expert '{path}' was not aligned by this config: name it as experts.{name}.pretrained and leave it out of "
            "prealign.experts, or delete it to align it again"
        )
    if not whole:
        raise ValueError(f"expert '{path}' is damaged: it differs from its checksum; copy it again, or delete it to "
                         "align it again")  # fmt: skip
    expert = model.model.vision_tower.experts[name]
    assert isinstance(expert, Expert)
    load_expert_weights(expert, str(path))
