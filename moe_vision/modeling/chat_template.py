"""Make a language model's chat template fit for images: probe what it prints, and wrap it where that is not right.

The result is a template that takes messages whose content is a string or a list of parts, as every consumer of a saved
processor sends them. Each text and each image placeholder is printed exactly once and in order, and the generation
prompt is what comes before an answer within a conversation.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from moe_vision.modeling.chat_rendering import answer_frame, render_chat, shortened, split_at, stand_in
from moe_vision.modeling.special_tokens import added_special_tokens

TEMPLATES = Path(str(resources.files("moe_vision"))) / "chat_templates"
SHIPPED = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
"""Names of the chat templates that this package has."""

END_OF_TURN = re.compile(r"set end_of_turn = '([^']+)'")
"""The statement by which a template names its end-of-turn token."""

FORMS = (("parts", "parts"), ("parts", "string"), ("string", "string"), ("part", "part"), ("part", "string"))
"""Forms of users' turns and of all others that are tried: a list of parts, one part of text, or a string."""

PROLOGUE = """\
{%- set moe_vision = namespace(turns=[], system='') -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}
  {%- set form = moe_vision_users if message['role'] == 'user' else moe_vision_others -%}
  {%- set made = namespace(parts=[], text='') -%}
  {%- if moe_vision_merged and moe_vision.system and message['role'] == 'user' -%}
    {%- set content = [{'type': 'text', 'text': moe_vision.system + '\\n\\n'}] + content -%}
    {%- set moe_vision.system = '' -%}
  {%- endif -%}
  {%- for part in content or [] -%}
    {%- if part is string -%}{%- set part = {'type': 'text', 'text': part} -%}{%- endif -%}
    {%- if part['type'] in ['image', 'image_url', 'input_image'] -%}
      {%- set made.parts = made.parts + [{'type': 'image'}] -%}
      {%- set made.text = made.text + moe_vision_image -%}
    {%- elif part['text'] is string -%}
      {%- set made.parts = made.parts + [{'type': 'text', 'text': part['text']}] -%}
      {%- set made.text = made.text + part['text'] -%}
    {%- else -%}
      {{- raise_exception('content parts of type ' ~ part['type'] ~ ' are not supported: use text and image') -}}
    {%- endif -%}
  {%- endfor -%}
  {%- if moe_vision_merged and message['role'] == 'system' -%}
    {%- set moe_vision.system = made.text -%}
  {%- elif not content -%}
    {%- set moe_vision.turns = moe_vision.turns + [message] -%}
  {%- elif form == 'string' -%}
    {%- set moe_vision.turns = moe_vision.turns + [dict(message, content=made.text)] -%}
  {%- elif form == 'part' -%}
    {%- set moe_vision.turns = moe_vision.turns + [dict(message, content=[{'type': 'text', 'text': made.text}])] -%}
  {%- else -%}
    {%- set moe_vision.turns = moe_vision.turns + [dict(message, content=made.parts)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = moe_vision.turns -%}
"""


@dataclass(frozen=True)
class Wrapping:
    """What is put around a template.

    forms: of users' turns and of the others; None to hand them on unchanged. merged: a system turn becomes the
    beginning of the first user's. prefix: special tokens to print first. opening: the generation prompt; None for the
    template's own.
    """

    forms: tuple[str, str] | None = None
    merged: bool = False
    prefix: str = ""
    opening: str | None = None

    def variables(self, image_token: str) -> dict[str, Any]:
        """What the prologue reads."""
        if self.forms is None:
            return {}
        users, others = self.forms
        return {
            "moe_vision_users": users, "moe_vision_others": others, "moe_vision_merged": self.merged,
            "moe_vision_image": f"{image_token}\n",
        }  # fmt: skip

    def around(self, template: str, image_token: str) -> str:
        """The wrapped template."""
        before = "".join(f"{{%- set {key} = {value!r} -%}}\n" for key, value in self.variables(image_token).items())
        if self.forms is not None:
            before += PROLOGUE
        if self.prefix:
            before += f"{{{{- {self.prefix!r} -}}}}{{#- special tokens of the tokenizer #}}\n"
        if self.opening is None:
            return before + template
        before += "{%- set moe_vision_open = add_generation_prompt | default(false) -%}\n"
        before += "{%- set add_generation_prompt = false %}\n"
        after = f"{{% if moe_vision_open %}}{{{{ {self.opening!r} }}}}{{% endif %}}"
        return before + template.removesuffix("\n") + after


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IMAGE_PART = {"type": "image"}
SYSTEM, FIRST, SECOND, THIRD, ANSWER, OTHER_ANSWER = (
    "Obey rule seventeen.", "What does frame alpha show?", "Where is object beta?", "And who holds gamma?",
    "a crimson square", "beside the lamp",
)  # fmt: skip


def conversations() -> dict[str, list[tuple[str, list[Any]]]]:
    """Probes by name: turns of a role and its parts. Every conversation ends with a question."""
    one = [("user", [FIRST])]
    several = [*one, ("assistant", [ANSWER]), ("user", [SECOND]), ("assistant", [OTHER_ANSWER]), ("user", [THIRD])]
    return {
        "one turn": one,
        "several turns": several,
        "a system turn": [("system", [SYSTEM]), *several],
        "an image in the first turn": [("user", [IMAGE_PART, FIRST]), *several[1:]],
        "an image in a later turn": [*several[:2], ("user", [IMAGE_PART, SECOND]), *several[3:]],
        "an image after the text": [("user", [FIRST, IMAGE_PART]), *several[1:3]],
        "two images": [("system", [SYSTEM]), ("user", [IMAGE_PART, FIRST, IMAGE_PART, SECOND])],
    }


def as_messages(turns: Sequence[tuple[str, list[Any]]], strings: bool = False) -> list[dict[str, Any]]:
    """Chat messages of a probe. strings: turns of a single text have a string as their content."""
    messages = []
    for role, parts in turns:
        content: Any = [text_part(part) if isinstance(part, str) else part for part in parts]
        messages.append({"role": role, "content": parts[0] if strings and isinstance(parts[-1], str) else content})
    return messages


def faults(tokenizer: Any, template: str, variables: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the texts of the probes, each with what the template printed. variables: of the prologue."""
    image = tokenizer.image_token
    for name, turns in conversations().items():
        ended = [*turns, ("assistant", [OTHER_ANSWER if len(turns) < 3 else "done, finally"])]
        for generation, probe in ((True, turns), (False, ended)):
            text = rendered(tokenizer, template, as_messages(probe), generation, variables)
            if text.startswith("!"):
                yield f"{name}: it failed: {text[1:]}"
                continue
            if fault := out_of_order(text, [part for _, parts in probe for part in parts], image):
                yield f"{name}: {fault} {shortened(text)!r}"
            images = any(IMAGE_PART in parts for _, parts in probe)
            if (
                not images
                and rendered(tokenizer, template, as_messages(probe, strings=True), generation, variables) != text
            ):
                yield f"{name}: it prints a string in another way than a list of one text {shortened(text)!r}"


def rendered(
    tokenizer: Any, template: str, messages: Sequence[Mapping[str, Any]], generation: bool,
    variables: Mapping[str, Any],
) -> str:  # fmt: skip
    """The text, or the template's error after '!'. Templates raise whatever their expressions raise."""
    try:
        return render_chat(tokenizer, template, messages, generation, **variables)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        return f"!{type(error).__name__}: {error}"


def out_of_order(text: str, parts: Sequence[Any], image: str) -> str | None:
    """What is wrong with the order and number of a conversation's texts and placeholders in its rendering."""
    texts = [image if part == IMAGE_PART else part for part in parts]
    for part in dict.fromkeys(texts):
        if text.count(part) != texts.count(part):
            return f"it prints {part!r} {text.count(part)} times instead of {texts.count(part)}:"
    at = 0
    for part in texts:
        at = text.find(part, at)
        if at < 0:
            return f"it prints {part!r} out of order:"
        at += len(part)
    return None


def generation_prompt(tokenizer: Any, template: str) -> str | None:
    """The opening of an answer, where the template's own is not what it prints before answers; None where it is.

    Templates of reasoning models open a thought that the answers of a conversation do not have, or leave out what
    comes before each answer. Raises ValueError where nothing that opens an answer can be found.
    """
    question, answer, more = ({"role": r, "content": t} for r, t in
                              (("user", FIRST), ("assistant", stand_in(0)), ("user", SECOND)))  # fmt: skip
    base = render_chat(tokenizer, template, [question])
    own = render_chat(tokenizer, template, [question], generation=True)
    before, _ = split_at(render_chat(tokenizer, template, [question, answer, more]), stand_in(0))
    wanted = before.rstrip(" ")  # tokenizers join a space to the word after it
    if own == wanted:
        return None
    if not wanted.startswith(base):
        raise ValueError(f"it prints {shortened(base)!r} for a question, and {shortened(before)!r} before its answer")
    return wanted.removeprefix(base)


def known_end(tokenizer: Any, template: str) -> str:
    """The template, with the tokenizer's end token where it sets an end-of-turn token that the tokenizer lacks."""
    named = END_OF_TURN.search(template)
    if named is None or named[1] in tokenizer.get_added_vocab():
        return template
    return template.replace(named[0], "set end_of_turn = eos_token", 1)


@lru_cache(maxsize=8)
def usable_template(tokenizer: Any, template: str, source: str) -> str:
    """A chat template that a fused model can use, made from `template` by as little as possible.

    tokenizer: has an `image_token`. source: what to call the template in errors. Raises ValueError, which says what
    the template printed, where neither lists of parts nor strings come out right.
    """
    template = known_end(tokenizer, template)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    missing = [name for name in names if name in template and getattr(tokenizer, name) is None]
    template = "".join(f"{{%- set {name} = '' %}}\n" for name in missing) + template
    problems: dict[str, str] = {}
    for merged in (False, True):
        for forms in FORMS if merged else (None, *FORMS):
            try:
                return fitted(tokenizer, template, Wrapping(forms, merged))
            except (ValueError, TemplateError) as error:
                problems.setdefault("a string" if forms == ("string", "string") else "a list of parts", str(error))
    told = "; ".join(f"with {form} as content: {problem}" for form, problem in problems.items())
    raise ValueError(
        f"language_model.chat_template: {source} cannot be used with images. {told}. Hint: set "
        f"language_model.chat_template to one of {', '.join(SHIPPED)}, or to a Jinja file that prints every text and "
        f"{tokenizer.image_token!r} once and in order and a special token after each answer (docs/language_models.md)"
    )


def fitted(tokenizer: Any, template: str, wrapping: Wrapping) -> str:
    """The template in this wrapping, with the generation prompt that it needs. Raises ValueError where it is wrong."""
    image = tokenizer.image_token
    probed = template if wrapping.forms is None else PROLOGUE + template  # compiled once for all forms
    variables = wrapping.variables(image)
    raise_first(faults(tokenizer, probed, variables))
    prefix, _ = added_special_tokens(tokenizer)
    printed = rendered(tokenizer, probed, as_messages([("user", [FIRST])]), True, variables)
    if not printed.startswith(prefix):
        wrapping = replace(wrapping, prefix=prefix)
    text = wrapping.around(template, image)
    opening = generation_prompt(tokenizer, text)
    if opening is not None:
        text = replace(wrapping, opening=opening).around(template, image)
    raise_first(faults(tokenizer, text, {}))
    raise_first(prompt_faults(tokenizer, text))
    return text


def raise_first(problems: Iterator[str]) -> None:
    """Raises ValueError with the first problem, if there is one."""
    for problem in problems:
        raise ValueError(problem)


def prompt_faults(tokenizer: Any, template: str) -> Iterator[str]:
    """Where a conversation does not continue each of its prompts, and where nothing ends an answer."""
    frame = answer_frame(tokenizer, template)
    if not frame.end:
        yield f"it prints no special token of the tokenizer after an answer, so that answers would never end: {frame}"
    for name, turns in conversations().items():
        messages = as_messages(turns)
        whole = render_chat(tokenizer, template, messages, generation=True)
        for index, (role, parts) in enumerate(turns):
            if role == "assistant":
                prompt = render_chat(tokenizer, template, messages[:index], generation=True)
                if not whole.startswith(f"{prompt}{frame.gap}{parts[0]}{frame.end}"):
                    yield f"{name}: its prompt {shortened(prompt)!r} does not begin {shortened(whole)!r}"
