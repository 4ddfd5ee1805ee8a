"""The prompt that a published checkpoint was trained with, from facts of its tokenizer.

The language models of these systems are Vicuna, Llama 3 and Yi, and each system has one conversation for each of them
(`conversation.py` of NVlabs/Eagle at 714d990, yfzhang114/SliME at e008540 and thunlp/LLaVA-UHD). A folder's own chat
template is that of its language model before it saw images, and is not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_vision.modeling.model_config import LanguageModelConfig


class CheckpointError(ValueError):
    """A folder that is not a checkpoint of the system it should be imported from."""


@dataclass(frozen=True)
class Conversation:
    """template: a chat template of this package. end: the token that ends an answer.

    tokens: those that only this family's tokenizers have.
    """

    template: str
    end: str
    tokens: tuple[str, ...]


LLAMA_3 = Conversation("llama3", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
EAGLE_LLAMA_3 = Conversation("eagle_llama3", LLAMA_3.end, LLAMA_3.tokens)
YI = Conversation("chatml_direct", "<|im_end|>", ("<|im_start|>", "<|im_end|>"))
VICUNA = Conversation("vicuna_v1", "</s>", ("<s>", "</s>"))

CONVERSATIONS: Mapping[str, tuple[Conversation, ...]] = {
    "eagle": (EAGLE_LLAMA_3, YI, VICUNA),
    "slime": (LLAMA_3, YI, VICUNA),
    "llava-uhd": (LLAMA_3, YI, VICUNA),
}
"""Conversations of each system; the first whose tokens a tokenizer has is the one."""


def conversation(system: str, tokenizer: Any) -> Conversation | None:
    """The conversation of a system's checkpoint with this tokenizer; None where the tokenizer is of another family."""
    vocabulary = tokenizer.get_vocab()
    return next((c for c in CONVERSATIONS[system] if all(token in vocabulary for token in c.tokens)), None)


def prompt_template(system: str, language: LanguageModelConfig, tokenizer: Any) -> str:
    """The chat template's text: `language_model.chat_template` if it is given, else the published conversation.

    Raises CheckpointError where there is neither.
    """
    template, published = language.template(), conversation(system, tokenizer)
    if template is None and published is not None:
        template = LanguageModelConfig(architecture=language.architecture, chat_template=published.template).template()
    if template is None:
        known = ", ".join(sorted({c.template for c in CONVERSATIONS[system]}))
        raise CheckpointError(
            f"'{tokenizer.name_or_path}': its tokenizer is of none of the families that {system} was published with: "
            f"give language_model.chat_template=NAME, one of {known}, or a Jinja file"
        )
    begin = tokenizer.bos_token if adds_bos(tokenizer) else ""
    template = template.replace("set begin = ''", f"set begin = {begin!r}")
    return template.replace("set gap = ''", f"set gap = '{gap(tokenizer)}'")


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its token for the beginning before a text. Yi's do not."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def gap(tokenizer: Any) -> str:
    """What a prompt must hold after BOS and images, so that text is tokenised as LLaVA does: piece by piece.

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
