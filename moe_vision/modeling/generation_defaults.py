"""The generation config of a fused model: its language model's own, with what the fused model needs added."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from moe_vision.experts.weights import located
from moe_vision.modeling.model_files import ModelFilesError, find_file, read_object, reading

FILE = "generation_config.json"

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")

SAMPLING_ONLY = ("temperature", "top_p", "top_k", "typical_p", "min_p", "top_h", "epsilon_cutoff", "eta_cutoff")
"""Settings that have no effect unless `do_sample` is true. transformers refuses to save them then."""

BEAMS_ONLY = ("early_stopping", "length_penalty")
"""Settings that have no effect with one beam."""


def generation_config_of(
    source: str | None, text_config: PreTrainedConfig, tokenizer: Any, image_token_id: int, stops: Iterable[int] = ()
) -> GenerationConfig:
    """The generation config of a model that is fused from a language model.

    source: folder or Hub id of the language model; None for random weights. text_config: its config, which is used
    where the source has no generation_config.json. stops: token ids that end a turn of the chat template.

    All settings of the language model are kept. Generation stops at any of its end tokens, the tokenizer's end token
    and `stops`. The padding token is the language model's own if the tokenizer knows it as a special token, else the
    tokenizer's. The image token is never generated. Raises ModelFilesError if generation_config.json is unusable.
    """
    path = None if source is None else find_file(located(source), FILE)
    if path is None:
        origin = "the language model's config"
        values = GenerationConfig.from_model_config(text_config).to_dict()
    else:
        origin = f"'{path}'"
        values = read_object(path)
    values = {key: value for key, value in effective(values).items() if not key.startswith("_")}
    vocabulary = max(text_config.vocab_size, *tokenizer.get_vocab().values()) + 1
    own = token_ids(values.pop("eos_token_id", None), "eos_token_id", origin)
    ends = [*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *stops]
    padding = token_ids(values.pop("pad_token_id", None), "pad_token_id", origin)
    suppressed = token_ids(values.pop("suppress_tokens", None), "suppress_tokens", origin)
    # Some published files give -1 or an id of another vocabulary: such a token is never generated.
    values["eos_token_id"] = [token for token in dict.fromkeys(ends) if 0 <= token < vocabulary] or None
    values["pad_token_id"] = next((i for i in padding if i in tokenizer.all_special_ids), tokenizer.pad_token_id)
    values["suppress_tokens"] = list(dict.fromkeys([*suppressed, image_token_id]))
    if values.get("bos_token_id") is None:
        values["bos_token_id"] = tokenizer.bos_token_id
    with reading(path or origin):
        config = GenerationConfig.from_dict(values)
        config.validate(strict=True)
    return config


def effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that change what `generate` does, so that transformers saves them: published files often have a
    temperature without `do_sample`, which is greedy decoding."""
    unused: tuple[str, ...] = ()
    if values.get("do_sample") is not True:
        unused += SAMPLING_ONLY
    if values.get("num_beams") in (None, 1):
        unused += BEAMS_ONLY
    if values.get("max_new_tokens") is not None:
        unused += ("max_length",)  # `max_new_tokens` wins, with a warning in each call
    return {key: value for key, value in values.items() if key not in unused and value is not None}


def token_ids(value: Any, key: str, origin: str) -> list[int]:
    """A token id, or a list of them, as a list. Raises ModelFilesError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ModelFilesError(f"{origin}: {key} is {value!r}: write a token id or a list of token ids")
    return ids
