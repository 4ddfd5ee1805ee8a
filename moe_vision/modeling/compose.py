"""From a model config to a fused model with its weights, and from a folder back to one.

ModelConfig ─ compose() ─ model, processor ─ save_pretrained ─ folder ─ load() ─ model, processor
"""

import copy
import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from moe_vision.experts.weight_values import WeightsError
from moe_vision.experts.weights import load_expert_weights, located
from moe_vision.files import give_usual_modes
from moe_vision.modeling import (
    MoeVisionConfig,
    MoeVisionForConditionalGeneration,
    MoeVisionImageProcessor,
    MoeVisionProcessor,
)
from moe_vision.modeling.chat_rendering import end_of_turn_ids, mark_as_special
from moe_vision.modeling.chat_template import usable_template
from moe_vision.modeling.folder_checks import InitialZeros, check_objects, load_processor, read_skeleton
from moe_vision.modeling.generation_defaults import generation_config_of
from moe_vision.modeling.model_config import LanguageModelConfig, ModelConfig
from moe_vision.modeling.model_files import reading
from moe_vision.modeling.sentencepiece_tokenizer import read_tokenizer
from moe_vision.modeling.stored_weights import (
    check_parameters,
    check_types,
    stored_types,
    weight_files,
)
from moe_vision.modeling.turns import Turns, turns_of

__all__ = ["ModelConfig", "compose", "load", "save"]

SAME_LOGITS = 1e-4
"""Largest difference of the logits of a language model by itself and within a fused model."""


def compose(config: ModelConfig) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    """Build the fused model with every weight that its config names, in fp32, and its processor.

    Raises WeightsError where weights do not fit, OSError where the language model or its tokenizer cannot be found.
    """
    language = config.language_model
    language.check_sources()
    source = language.tokenizer or language.pretrained
    if source is None:
        raise ValueError("language_model has no tokenizer: give `tokenizer`, a Hub id or a folder")
    language.text_config()  # a fault of config.json is not to be found by the tokenizer, which reads it too
    tokenizer = load_tokenizer(located(source), language.image_token)
    image_token_id: Any = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    hf_config = config.hf_config(image_token_id, marker_ids(config, tokenizer), question_turns(config, tokenizer))
    stops = end_of_turn_ids(tokenizer, chat_template_of(config, tokenizer))
    defaults = generation_config_of(language.pretrained, hf_config.text_config, tokenizer, image_token_id, stops)
    model = build(hf_config, language)
    check_language_model(model, language.pretrained or model.config.text_config.model_type)
    for name, expert in config.experts.items():
        if expert.pretrained is not None:
            load_expert_weights(model.model.vision_tower.experts[name], expert.pretrained)
    compile_experts(model, config)
    if language.pretrained is not None:
        load_language_model(model, located(language.pretrained))
    fit_vocabulary(model, tokenizer)
    model.generation_config = defaults
    return model, make_processor(config, hf_config, tokenizer)


def build(config: MoeVisionConfig, language: LanguageModelConfig) -> MoeVisionForConditionalGeneration:
    """The model with random weights in fp32. Raises ModelFilesError where no language model can be built of its
    source's config.json."""
    try:
        return MoeVisionForConditionalGeneration(copy.deepcopy(config)).float()
    except Exception:
        if language.pretrained is not None and language.architecture is None:
            with reading(f"{located(language.pretrained)}/config.json"), torch.device("meta"):
                AutoModel.from_config(config.text_config)
        raise


def fit_vocabulary(model: MoeVisionForConditionalGeneration, tokenizer: Any) -> None:
    """Add rows to embeddings and head where the tokenizer has ids beyond them. Published embeddings are often padded,
    and then keep their size. Ids may have gaps, so the largest one counts, not their number."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > model.config.text_config.vocab_size:
        model.resize_token_embeddings(needed)


def compile_experts(model: MoeVisionForConditionalGeneration, config: ModelConfig) -> None:
    """Send the experts that the config says so through torch.compile; it happens at their first forward pass."""
    for name, expert in config.experts.items():
        if expert.compile:
            model.model.vision_tower.experts[name].compile()


def load_tokenizer(source: str, image_token: str, **settings: Any) -> Any:
    """A tokenizer that has an image token (`image_token` where it has none of its own), pads, and pads left.

    settings: passed to `from_pretrained`. Raises ModelFilesError naming the file that cannot be used.
    """
    if Path(source).is_dir():
        check_objects(Path(source))
    with reading(f"{source}/tokenizer.json, tokenizer_config.json, chat_template.jinja"):
        tokenizer = read_tokenizer(source, **settings)
        if getattr(tokenizer, "image_token", None) is None:
            tokenizer = read_tokenizer(source, extra_special_tokens={"image_token": image_token}, **settings)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer '{source}' has no padding token and no end token: add `pad_token` and `eos_token` to "
                "its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def marker_ids(config: ModelConfig, tokenizer: Any) -> dict[str, int]:
    """Tokens of the slicing's markers that have a text, by the marker's name, from the tokenizer in use.

    Raises ValueError where the tokenizer has no single token for a text.
    """
    ids = {}
    for marker in config.slicing.markers():
        if marker.text is None:
            continue
        tokens = tokenizer(marker.follows + marker.text, add_special_tokens=False)["input_ids"]
        # Some tokenizers put a space, or a token of its own for one, before every text.
        if tokenizer.decode(tokens[:-1]).strip() != marker.follows or tokens[-1] == tokenizer.unk_token_id:
            raise ValueError(
                f"slicing '{config.slicing.type_name}' marks with {marker.text!r} ({marker.name}), which is no single "
                f"token of the tokenizer '{tokenizer.name_or_path}': choose another text for it"
            )
        ids[marker.name] = tokens[-1]
    return ids


def question_turns(config: ModelConfig, tokenizer: Any) -> Turns | None:
    """Token ids around users' turns, where a selector reads the question. Raises ValueError where there are none."""
    selector = config.branches.selector
    if selector is None or selector.reads != "question":
        return None
    return turns_of(tokenizer, chat_template_of(config, tokenizer))


def chat_template_of(config: ModelConfig, tokenizer: Any) -> str | None:
    """The chat template that the processor gets: the config's or the tokenizer's, made fit for images. None where there
    is neither. Raises ValueError where it cannot be used with images.
    """
    language = config.language_model
    template = language.template()
    source = f"'{language.chat_template}'"
    if template is None:
        template = tokenizer.chat_template
        source = f"the chat template of the tokenizer '{tokenizer.name_or_path}'"
        if isinstance(template, dict):
            template = template.get("default")
    return None if template is None else usable_template(tokenizer, template, source)


def check_language_model(model: MoeVisionForConditionalGeneration, source: str) -> None:
    """Raises ValueError where no visual token could stand among a language model's own, or where it keeps no cache."""
    language: Any = model.model.language_model
    cure = "choose another language model"
    embedded, hidden_size = language.get_input_embeddings().weight.shape[1], model.config.text_config.hidden_size
    if embedded != hidden_size:
        raise ValueError(
            f"language model '{source}' embeds its tokens in {embedded} values and widens them to {hidden_size} "
            f"inside, where visual tokens cannot come in: {cure}"
        )
    if "past_key_values" not in inspect.signature(language.forward).parameters:
        raise ValueError(f"language model '{source}' keeps a state and no keys and values of past tokens: {cure}")


def load_language_model(model: MoeVisionForConditionalGeneration, source: str) -> None:
    """Copy a causal language model's weights into the fused model, exactly, in fp32.

    A multimodal model gives its text decoder. Raises WeightsError if weights are missing or unusable, ValueError if the
    logits change: some families do more to them than a linear layer.
    """
    stored = stored_types(weight_files(source))
    check_types(stored, set())
    with reading(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    causal, info = loaded[0].eval(), loaded[1]
    check_loaded(info, ("missing_keys", "mismatched_keys"), source)
    language: Any = model.model.language_model
    decoder = next((module for module in causal.modules() if type(module) is type(language)), None)
    if decoder is None:
        raise ValueError(
            f"language model '{source}' ({causal.config.model_type}) has no {type(language).__name__}, which its text "
            "config makes: choose another language model"
        )
    check_parameters(decoder, lambda key: not language.get_parameter(key).any(), stored, source)
    check_parameters(causal.get_output_embeddings(), lambda key: False, stored, source)
    language.load_state_dict(decoder.state_dict())
    if not model.config.tie_word_embeddings:
        model.lm_head.load_state_dict(causal.get_output_embeddings().state_dict(), strict=False)  # compared below
    training = model.training
    ids = torch.arange(16)[None] % model.config.text_config.vocab_size
    with torch.inference_mode():
        difference = (model.eval()(ids).logits - causal(ids).logits).abs().max().item()
    model.train(training)
    if not difference <= SAME_LOGITS:
        raise ValueError(
            f"language model '{source}' ({causal.config.model_type}): as part of a fused model its logits differ from "
            f"its own by up to {difference:.3g}, because its head is more than a linear layer without bias: choose "
            "another language model"
        )


def check_loaded(info: Mapping[str, Any], kinds: Sequence[str], source: Path | str) -> None:
    """Raise WeightsError if transformers' loading info lists keys of these kinds."""
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
    if wrong:
        details = "; ".join(f"{kind.removesuffix('_keys')}: {keys[:4]}" for kind, keys in wrong.items())
        raise WeightsError(
            f"the weights in '{source}' belong to another composition than its config.json ({details}): restore the "
            "folder, or train again"
        )


def make_processor(config: ModelConfig, hf_config: MoeVisionConfig, tokenizer: Any) -> MoeVisionProcessor:
    """The processor whose slicing and placeholder counts are those of the model."""
    template = chat_template_of(config, tokenizer)
    mark_as_special(tokenizer, end_of_turn_ids(tokenizer, template))
    return MoeVisionProcessor(
        image_processor=MoeVisionImageProcessor(slicing=hf_config.vision_config.slicing),
        tokenizer=tokenizer,
        chat_template=template,
    )


def save(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write a model folder whole or not at all; one that is there is replaced. weights: in place of the model's own."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    processor.save_pretrained(temporary)
    give_usual_modes(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def model_folder(path: Path) -> Path:
    """The model's folder in a run's output, or the path itself."""
    return path / "model" if (path / "model" / "config.json").is_file() else path


def load(
    folder: Path | str, dtype: torch.dtype | None = None
) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    """Read a fused model and its processor from a folder that training or export wrote; the saved dtype by default.

    folder: a model folder, or a run's output that has one.
    Raises ValueError if the folder is not one, or if its weights and its config do not belong together.
    """
    folder = model_folder(Path(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"'{folder}' is no model folder: it has no config.json; give the output of an ended run, or an export"
        )
    check_objects(folder)
    skeleton = read_skeleton(folder)
    files = weight_files(str(folder))
    stored = stored_types(files)
    check_types(stored, {key for key, value in skeleton.state_dict().items() if value.is_floating_point()})
    with reading(f"{folder}/{files[0].name if len(files) == 1 else '*'}"):
        loaded: Any = MoeVisionForConditionalGeneration.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    check_loaded(info, [kind for kind in info if kind.endswith("_keys")], folder)
    check_parameters(model, InitialZeros(model.config), stored, str(folder))
    return model.eval(), load_processor(folder, model.config)
