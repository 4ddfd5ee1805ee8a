"""What a model config file may say.

configs/model/micro.yaml ─ ModelConfig ─ hf_config() ─ MoeVisionConfig
"""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from transformers import AutoConfig, PreTrainedConfig

from moe_vision.config import Config, Registered
from moe_vision.experts import EXPERTS, ExpertConfig
from moe_vision.experts.weights import located
from moe_vision.fusion import ADAPTERS, MIXERS, AdapterConfig, MixerConfig
from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig

SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config fields of language models whose logits are more than a plain `lm_head`: refused, not silently wrong."""


class BranchConfig(Config):
    """How the views of one branch become visual tokens."""

    mixer: Annotated[MixerConfig, Registered(MIXERS)]
    adapter: Annotated[AdapterConfig, Registered(ADAPTERS)]


class BranchesConfig(Config):
    """overview: the whole image in one view."""

    overview: BranchConfig


def packaged_config(name: str) -> Path:
    """Path of a config file that ships with this package, as `model/micro.yaml`."""
    return Path(str(resources.files("moe_vision"))) / "configs" / name


class LanguageModelConfig(Config):
    """pretrained: Hub id, local folder, or `moe_vision:…` for one that ships with the package; null for random weights.

    architecture: values of a transformers config, needed only where the source's own config cannot be read (offline
    cost tables, random weights). image_token: placeholder in prompts, added to the tokenizer if it lacks one.
    chat_template: a Jinja file, or the name of one that ships with this package, in place of the tokenizer's own.
    """

    pretrained: str | None = None
    tokenizer: str | None = None
    architecture: dict[str, Any] | None = None
    image_token: str = "<image>"
    chat_template: str | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> "LanguageModelConfig":
        if self.pretrained is None and self.architecture is None:
            raise ValueError("language_model has neither pretrained nor architecture: give one of them")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("architecture has no model_type: add it, as in `model_type: llama`")
        return self

    def template(self) -> str | None:
        """Text of the chat template, or None for the tokenizer's own. Raises ValueError if there is no such file."""
        if self.chat_template is None:
            return None
        packaged = Path(str(resources.files("moe_vision"))) / "chat_templates"
        for path in (packaged / f"{self.chat_template}.jinja", Path(self.chat_template)):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        known = sorted(path.stem for path in packaged.glob("*.jinja"))
        raise ValueError(f"chat_template '{self.chat_template}': no such file; this package has {known}")

    def text_config(self) -> PreTrainedConfig:
        """The language model's transformers config; reads it from the source unless `architecture` gives it."""
        if self.architecture is not None:
            values = {key: value for key, value in self.architecture.items() if key != "model_type"}
            config = AutoConfig.for_model(self.architecture["model_type"], **values)
        else:
            assert self.pretrained is not None
            config = AutoConfig.from_pretrained(located(self.pretrained)).get_text_config()
        scaled = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
        if scaled:
            raise ValueError(f"language model '{self.pretrained or config.model_type}' changes its logits by {scaled}, "
                             "which a fused model does not: choose another language model")  # fmt: skip
        return config


class ModelConfig(Config):
    """A fused model: experts in their order, one branch over them, a language model.

    image_fit: `pad` keeps an image's shape and pads it to the canvas, `stretch` gives its shape up, `crop` its margins.
    padding_colour: red, green and blue in 0..255; mid-grey, because experts differ in their mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    plugins: list[str] = Field(default_factory=list)
    experts: dict[str, Annotated[ExpertConfig, Registered(EXPERTS)]] = Field(min_length=1)
    branches: BranchesConfig
    language_model: LanguageModelConfig
    image_fit: Literal["pad", "stretch", "crop"] = "pad"
    padding_colour: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field((127, 127, 127), min_length=3, max_length=3)

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
        mixed = self.branches.overview.mixer.shape({name: expert.shape for name, expert in self.experts.items()})
        self.branches.overview.adapter.shape(mixed, hidden_size=1)  # its width does not change whether it fits
        return self

    def hf_config(self, image_token_id: int = 0) -> MoeVisionConfig:
        """The transformers config of the fused model."""
        branches = {
            name: {"mixer": branch.mixer.to_dict(), "adapter": branch.adapter.to_dict()}
            for name, branch in (("overview", self.branches.overview),)
        }
        experts = [{"name": name, **expert.to_dict()} for name, expert in self.experts.items()]
        text_config = self.language_model.text_config()
        return MoeVisionConfig(
            vision_config={"experts": experts, "branches": branches},
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
                "overview": {
                    "mixer": self.branches.overview.mixer.to_dict(),
                    "adapter": self.branches.overview.adapter.to_dict(),
                }
            },
            "language_model": self.language_model.model_dump(),
            "image_fit": self.image_fit,
            "padding_colour": list(self.padding_colour),
        }
