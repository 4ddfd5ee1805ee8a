"""The Hugging Face config of a fused model: plain values only, so that it reads and writes as `config.json`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from moe_vision.experts.base import ExpertConfig
from moe_vision.fusion.base import AdapterConfig, MixerConfig
from moe_vision.fusion.selector import SelectorConfig
from moe_vision.modeling.turns import Turns
from moe_vision.registry import ADAPTERS, EXPERTS, MIXERS, SELECTORS, SLICING, Registry
from moe_vision.slicing.base import SlicingPolicy
from moe_vision.slicing.plan import Role, Size
from moe_vision.types import MapShape, TokenShape

FORMAT_VERSION = 1


def from_plain(registry: Registry, values: Mapping[str, Any]) -> Any:
    """Make a registered config from plain values with a `type` key. Raises UnknownNameError, TypeError, ValueError."""
    return registry[values["type"]](**{key: value for key, value in values.items() if key != "type"})


class SavesItsCode:
    """What an installed class saves loads without this package too, by the generated file that it puts beside it.

    write_code: writes that file into a folder, and names in `auto_map` what in it stands for the class. The file itself
    has none: transformers copies it from folder to folder.
    """

    write_code: ClassVar[Callable[[Any, Path], None] | None] = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        if self.write_code is not None:
            self.write_code(Path(save_directory))
        library: Any = super()
        return library.save_pretrained(save_directory, *args, **kwargs)


class MoeVisionVisionConfig(PreTrainedConfig):
    """Experts in their order, and the mixer and adapter of each branch, as plain dicts.

    experts: list of {name, type, variant, …}; branches: {overview or slices: {experts: names, mixer: {type, …},
    adapter: {type, …}}}, where slices without an entry go through the overview's. slicing: {type, …}. marker_ids:
    tokens of the tokenizer for markers that have a text, by name. selector: {type, …} of the slices' tokens, null to
    keep them all; turns: {starts, ends}, the token ids by which it tells the question.
    """

    model_type = "moe_vision_tower"
    base_config_key = "vision_config"

    def __init__(
        self,
        experts: list[dict[str, Any]] | None = None,
        branches: dict[str, dict[str, Any]] | None = None,
        slicing: dict[str, Any] | None = None,
        marker_ids: dict[str, int] | None = None,
        selector: dict[str, Any] | None = None,
        turns: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.experts = experts or []
        self.branches = branches or {}
        self.slicing = slicing or {"type": "none"}
        self.marker_ids = marker_ids or {}
        self.selector = selector
        self.turns = turns or {}
        super().__init__(**kwargs)

    def expert_configs(self) -> dict[str, ExpertConfig]:
        """Expert configs by name, in order; weights come from the folder that this config lies in."""
        configs = {}
        for values in self.experts:
            plain = {key: value for key, value in values.items() if key != "name"}
            configs[values["name"]] = from_plain(EXPERTS, {**plain, "pretrained": None})
        return configs

    def branch_of(self, role: Role) -> str:
        """Which branch views of this role go through."""
        return "slices" if role == "slice" and "slices" in self.branches else "overview"

    def branch_experts(self, branch: str) -> list[str]:
        """Names of the experts of a branch, in their order; all where it names none."""
        return self.branches[branch].get("experts") or [expert["name"] for expert in self.experts]

    def map_shapes(self, branch: str, size: Size | None = None) -> dict[str, MapShape]:
        """Maps of a branch's experts by name, of a view of `size`, or of one at each expert's own size."""
        configs = self.expert_configs()
        chosen = {name: configs[name] for name in self.branch_experts(branch)}
        return {n: c.shape if size is None else c.shape_at(c.size_at(size)) for n, c in chosen.items()}

    def mixer(self, branch: str) -> MixerConfig:
        return from_plain(MIXERS, self.branches[branch]["mixer"])

    def adapter(self, branch: str) -> AdapterConfig:
        return from_plain(ADAPTERS, self.branches[branch]["adapter"])

    def selector_config(self) -> SelectorConfig | None:
        return None if self.selector is None else from_plain(SELECTORS, self.selector)

    def turn_ids(self) -> Turns:
        return Turns(**self.turns)

    def mixed_shape(self, branch: str, size: Size | None = None) -> TokenShape:
        """Tokens of one view after the mixer of `branch`."""
        return self.mixer(branch).shape(self.map_shapes(branch, size))

    def canvas_size(self) -> Size:
        """Size (height, width) in pixels that holds every expert's input without enlarging a smaller one's view."""
        sizes = [config.size for config in self.expert_configs().values()]
        return (max(height for height, _ in sizes), max(width for _, width in sizes))

    def tokens_of(self, role: Role, size: Size) -> TokenShape:
        """Tokens of a view for the language model, of a width that does not matter here. Raises ValueError."""
        branch = self.branch_of(role)
        adapter, built_for = self.adapter(branch), self.mixed_shape(branch)
        try:
            mixed = self.mixed_shape(branch, size)
            adapted = adapter.shape(mixed, 1)
        except ValueError as error:
            policy = self.slicing["type"]
            raise ValueError(f"slicing '{policy}' makes views of {list(size)} pixels, and {error}") from None
        if not adapter.any_grid and mixed.grid != built_for.grid:
            raise ValueError(
                f"adapter '{adapter.type_name}' of branch '{branch}' is made for a grid of {built_for.grid} and "
                f"slicing gives it views of {mixed.grid}: choose one that takes any grid"
            )
        return adapted

    def policy(self) -> SlicingPolicy:
        """The slicing policy with this model's numbers of tokens. Raises ValueError where they do not fit."""
        values = dict(self.slicing)
        if values["type"] == "none" and values.get("size") is None:
            values["size"] = self.canvas_size()
        policy: SlicingPolicy = from_plain(SLICING, values)
        return policy.fitted(self.tokens_of)


class MoeVisionConfig(SavesItsCode, PreTrainedConfig):
    """Config of `MoeVisionForConditionalGeneration`.

    image_token_id: the placeholder that every visual token stands on; an id of the tokenizer's own vocabulary.
    """

    model_type = "moe_vision"
    sub_configs = {"vision_config": MoeVisionVisionConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: MoeVisionVisionConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image_token_id: int = 0,
        moe_vision_format: int = FORMAT_VERSION,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if moe_vision_format > FORMAT_VERSION:
            raise ValueError(
                f"this folder has moe_vision_format {moe_vision_format}; this code reads up to {FORMAT_VERSION}: "
                "upgrade moe-vision"
            )
        if isinstance(vision_config, dict):
            vision_config = MoeVisionVisionConfig(**{k: v for k, v in vision_config.items() if k != "model_type"})
        if isinstance(text_config, dict):
            values = {k: v for k, v in text_config.items() if k != "model_type"}
            text_config = AutoConfig.for_model(text_config["model_type"], **values)
        self.vision_config = vision_config if vision_config is not None else MoeVisionVisionConfig()
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.image_token_id = image_token_id
        self.moe_vision_format = moe_vision_format
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__init__(**{**kwargs, "tie_word_embeddings": tie_word_embeddings})
