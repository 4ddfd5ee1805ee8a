"""What a model config file may say.

configs/model/micro.yaml ─ ModelConfig ─ hf_config() ─ MoeVisionConfig
"""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from moe_vision.config import Config, Registered
from moe_vision.config_paths import EXPLICIT, FromFile
from moe_vision.experts import EXPERTS, ExpertConfig
from moe_vision.experts.weights import located
from moe_vision.files import read_text
from moe_vision.fusion import ADAPTERS, MIXERS, SELECTORS, AdapterConfig, MixerConfig, SelectorConfig
from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig, MoeVisionVisionConfig
from moe_vision.modeling.turns import Turns
from moe_vision.registry import suggest
from moe_vision.slicing import SLICING, NoSlicing, SlicingPolicy

MAX_LAYERS = 4096
"""Most layers of a language model: more take minutes to build."""

MAX_PARAMETERS = 10**13
"""Most parameters of a language model: more than any that exists."""

SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config fields of language models whose logits are more than a plain `lm_head`: refused, not silently wrong."""


def brief(error: Exception) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def check_architecture(architecture: Mapping[str, Any]) -> None:
    """Raises ValueError for values that transformers builds no language model of."""
    kind = architecture.get("model_type")
    if not isinstance(kind, str):
        raise ValueError("architecture has no model_type: add it, as in `model_type: llama`")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type '{kind}': {suggest(kind, [*CONFIG_MAPPING])[:400]}")
    layers = architecture.get(CONFIG_MAPPING[kind].attribute_map.get("num_hidden_layers", "num_hidden_layers"), 1)
    if isinstance(layers, int) and not 0 < layers <= MAX_LAYERS:
        raise ValueError(f"architecture has {layers} layers: write a number from 1 to {MAX_LAYERS}")
    try:
        build_empty(json.dumps(architecture, sort_keys=True))
    except Exception as error:  # config and model classes have their own kinds
        raise ValueError(f"architecture of '{kind}' is refused ({brief(error)}): fix the value") from error


@functools.lru_cache(maxsize=64)
def build_empty(architecture: str) -> None:
    """Build a language model of an architecture, in JSON, without memory for its weights."""
    values = json.loads(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"it has {count:,} parameters, more than {MAX_PARAMETERS:,}")


class BranchConfig(Config):
    """How the views of one branch become visual tokens. experts: names, all of the model's if null."""

    experts: list[str] | None = Field(None, min_length=1)
    mixer: Annotated[MixerConfig, Registered(MIXERS)]
    adapter: Annotated[AdapterConfig, Registered(ADAPTERS)]


class BranchesConfig(Config):
    """overview: the whole image in one view. slices: the parts of it that a slicing policy cuts. shared: slices go
    through the overview's mixer and adapter, in place of their own. selector: which of an image's tokens from slices
    the language model gets, by the question; all of them if null.
    """

    overview: BranchConfig
    slices: BranchConfig | None = None
    shared: bool = False
    selector: Annotated[SelectorConfig, Registered(SELECTORS)] | None = None

    def items(self) -> list[tuple[str, BranchConfig]]:
        """Branches that have a mixer and an adapter of their own, by name."""
        return [(n, branch) for n in ("overview", "slices") if (branch := getattr(self, n)) is not None]


def packaged_config(name: str) -> Path:
    """Path of a config file that ships with this package, as `model/micro.yaml`."""
    return Path(str(resources.files("moe_vision"))) / "configs" / name


class LanguageModelConfig(Config):
    """pretrained: Hub id, local folder, or `moe_vision:…` for one that ships with the package; null for random weights.

    architecture: values of a transformers config, needed only where the source's own config cannot be read (offline
    cost tables, random weights). image_token: placeholder in prompts, added to the tokenizer if it lacks one.
    chat_template: a Jinja file, or the name of one that ships with this package, in place of the tokenizer's own.
    """

    pretrained: Annotated[str | None, FromFile("name")] = None
    tokenizer: Annotated[str | None, FromFile("name")] = None
    architecture: dict[str, Any] | None = None
    image_token: str = "<image>"
    chat_template: Annotated[str | None, FromFile("file")] = None

    @model_validator(mode="after")
    def _has_a_source(self) -> "LanguageModelConfig":
        if self.pretrained is None and self.architecture is None:
            raise ValueError("language_model has neither pretrained nor architecture: give one of them")
        return self

    @field_validator("architecture")
    @classmethod
    def _can_be_built(cls, architecture: dict[str, Any] | None) -> dict[str, Any] | None:
        if architecture is not None:
            check_architecture(architecture)
        return architecture

    def check_sources(self) -> None:
        """Raises ValueError where a source is a path, and nothing is there."""
        for key in ("pretrained", "tokenizer", "chat_template"):
            source = getattr(self, key)
            if source is not None and source.startswith(EXPLICIT) and not os.path.exists(os.path.expanduser(source)):
                raise ValueError(f"language_model.{key} '{source}': no such file or folder; relative paths start at "
                                 "the folder of the config that holds them: fix the path")  # fmt: skip

    def template(self) -> str | None:
        """Text of the chat template, or None for the tokenizer's own. Raises ValueError if there is no such file."""
        if self.chat_template is None:
            return None
        packaged = Path(str(resources.files("moe_vision"))) / "chat_templates"
        for path in (packaged / f"{self.chat_template}.jinja", Path(self.chat_template)):
            if path.exists():
                return read_text(path, "language_model.chat_template")
        known = sorted(path.stem for path in packaged.glob("*.jinja"))
        raise ValueError(f"chat_template '{self.chat_template}': no such file; this package has {known}")

    def _source_config(self, source: str) -> PreTrainedConfig:
        """The config of a folder or a repository on the Hub. Raises ValueError."""
        self.check_sources()
        try:
            return AutoConfig.from_pretrained(os.path.expanduser(located(source)), trust_remote_code=False)
        except Exception as error:  # each config class has its own kinds
            raise ValueError(
                f"language_model.pretrained '{source}' has no config that transformers reads ({brief(error)}): give a "
                "folder that exists, relative to the config, or a Hub id that can be reached"
            ) from error

    def text_config(self) -> PreTrainedConfig:
        """The language model's transformers config; reads it from the source unless `architecture` gives it."""
        if self.architecture is not None:
            values = {key: value for key, value in self.architecture.items() if key != "model_type"}
            config = AutoConfig.for_model(self.architecture["model_type"], **values)
        else:
            assert self.pretrained is not None
            whole = self._source_config(self.pretrained)
            if getattr(whole, "quantization_config", None) is not None:
                raise ValueError(
                    f"language model '{self.pretrained}' is quantised (quantization_config in its config.json), and "
                    "training needs its full weights: choose the folder that it was quantised from"
                )
            config = whole.get_text_config()
            config._name_or_path = ""  # a path would tell about the machine wherever the model is published
        config.dtype = None  # of the source's files; a fused model has one dtype, and its language model is built in it
        scaled = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
        if scaled:
            raise ValueError(f"language model '{self.pretrained or config.model_type}' changes its logits by {scaled}, "
                             "which a fused model does not: choose another language model")  # fmt: skip
        return config


class ModelConfig(Config):
    """A fused model: experts in their order, one or two branches over them, a language model; slicing says which views
    of an image it sees.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    plugins: Annotated[list[str], FromFile("plugin")] = Field(default_factory=list)
    experts: dict[str, Annotated[ExpertConfig, Registered(EXPERTS)]] = Field(min_length=1)
    branches: BranchesConfig
    language_model: LanguageModelConfig
    slicing: Annotated[SlicingPolicy, Registered(SLICING)] = Field(default_factory=NoSlicing)

    @field_validator("experts", mode="before")
    @classmethod
    def _type_is_name_by_default(cls, experts: Any) -> Any:
        if not isinstance(experts, dict):
            return experts
        return {
            name: {"type": name, **values} if isinstance(values, dict) else values for name, values in experts.items()
        }

    @field_validator("experts", mode="after")
    @classmethod
    def _names_are_module_names(cls, experts: dict[str, ExpertConfig]) -> dict[str, ExpertConfig]:
        for name in experts:
            if not name.isidentifier():
                raise ValueError(f"expert name '{name}' is no identifier: use letters, digits and _ only")
        return experts

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        named = [name for _, branch in self.branches.items() for name in branch.experts or []]
        for name in named:
            if name not in self.experts:
                raise ValueError(f"a branch names the expert '{name}': {suggest(name, list(self.experts))}")
        idle = [name for name in self.experts if named and not self._used(name)]
        if idle:
            raise ValueError(f"experts {idle} are in no branch: name them in one, or take them out of experts")
        self._check_injection()
        sliced, policy = self.branches.slices is not None or self.branches.shared, self.slicing.type_name
        if self.branches.slices is not None and self.branches.shared:
            raise ValueError("branches has slices, and shared is true: leave one of them out")
        if self.slicing.has_slices and not sliced:
            raise ValueError(
                f"slicing '{policy}' cuts slices that no branch takes: add branches.slices, or branches.shared: true "
                "to send them through the overview's"
            )
        if sliced and not self.slicing.has_slices:
            raise ValueError(f"branches takes slices and slicing '{policy}' cuts none: choose another slicing")
        if self.branches.selector is not None and not sliced:
            raise ValueError(
                f"selector '{self.branches.selector.type_name}' chooses among the tokens of slices, and slicing "
                f"'{policy}' cuts none: choose another slicing, or leave the selector out"
            )
        self._check_projections(self.vision_config())
        return self

    def _check_projections(self, vision: MoeVisionVisionConfig) -> None:
        """Raises ValueError where an adapter is projected by another branch that cannot do it."""
        for name, branch in self.branches.items():
            other = branch.adapter.projected_by
            if other is None:
                continue
            given = vision.mixed_shape(name).channels
            taken = vision.adapter(other).projection_channels(vision.mixed_shape(other)) if other != name else None
            kind = vision.adapter(other).type_name
            if taken is None:
                raise ValueError(
                    f"projector '{other}' of branch '{name}': adapter '{kind}' of branch '{other}' has no projector to "
                    "share: set projector: own, or take gated_mixture there"
                )
            if taken != given:
                raise ValueError(
                    f"projector '{other}' of branch '{name}': it takes {taken} channels, and this branch's mixer gives "
                    f"{given}: set projector: own, or give both the same experts and mixer"
                )

    def _check_injection(self) -> None:
        """Raises ValueError where a mixer would speak between the blocks of an expert that does not let it."""
        for _, branch in self.branches.items():
            experts = {name: self.experts[name] for name in branch.experts or self.experts}
            name = branch.mixer.injected(experts)
            if name is None:
                continue
            blocks = experts[name].num_blocks
            if blocks is None:
                able = sorted(n for n, expert in self.experts.items() if expert.num_blocks is not None)
                raise ValueError(
                    f"mixer '{branch.mixer.type_name}' speaks between the blocks of its base, and expert '{name}' of "
                    f"type '{experts[name].type_name}' does not let it; these do: {able or 'none, add clip or eva02'}"
                )
            branch.mixer.check_blocks(blocks)

    def _used(self, name: str) -> bool:
        return any(branch.experts is None or name in branch.experts for _, branch in self.branches.items())

    def vision_config(
        self, marker_ids: Mapping[str, int] | None = None, turns: Turns | None = None
    ) -> MoeVisionVisionConfig:
        """The transformers config of everything before the language model."""
        selector = self.branches.selector
        vision = MoeVisionVisionConfig(
            experts=[{"name": name, **expert.to_dict()} for name, expert in self.experts.items()],
            branches={
                name: {
                    **({"experts": branch.experts} if branch.experts else {}),
                    "mixer": branch.mixer.to_dict(),
                    "adapter": branch.adapter.to_dict(),
                }
                for name, branch in self.branches.items()
            },
            slicing=self.slicing.to_dict(),
            marker_ids=dict(marker_ids or {}),
            selector=None if selector is None else selector.to_dict(),
            turns=None if turns is None else asdict(turns),
        )
        for name in vision.branches:
            vision.adapter(name).shape(vision.mixed_shape(name), 1)  # its width does not change whether it fits
        vision.slicing = vision.policy().to_dict()
        return vision

    def hf_config(
        self, image_token_id: int = 0, marker_ids: Mapping[str, int] | None = None, turns: Turns | None = None
    ) -> MoeVisionConfig:
        """The transformers config of the fused model. marker_ids: tokens of the slicing's markers that have a text.
        turns: token ids around users' turns, where a selector reads the question.
        """
        text_config = self.language_model.text_config()
        return MoeVisionConfig(
            vision_config=self.vision_config(marker_ids, turns),
            text_config=text_config.to_dict(),
            image_token_id=image_token_id,
        )

    def to_plain(self) -> dict[str, Any]:
        """Plain values that validate to an equal config: what a run keeps of its model."""
        return {
            "plugins": list(self.plugins),
            "experts": {
                n: {**e.to_dict(), "pretrained": e.pretrained, "compile": e.compile} for n, e in self.experts.items()
            },
            "branches": {
                **{
                    name: {
                        "experts": branch.experts,
                        "mixer": branch.mixer.to_dict(),
                        "adapter": branch.adapter.to_dict(),
                    }
                    for name, branch in self.branches.items()
                },
                "shared": self.branches.shared,
                "selector": None if self.branches.selector is None else self.branches.selector.to_dict(),
            },
            "language_model": self.language_model.model_dump(),
            "slicing": self.slicing.to_dict(),
        }
