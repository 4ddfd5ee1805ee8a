"""The miniature language model's tokenizer: byte-level BPE in which every word of the generated text is one token.

Any other text is spelt in bytes, so that nothing is ever unknown.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
USER, ASSISTANT = "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|assistant|>' -}}
    {%- generation -%}
      {%- if message['content'] is string -%}
        {{- message['content'] -}}
      {%- else -%}
        {%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
      {%- endif -%}
      {{- eos_token -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- '<|user|>' -}}
    {%- if message['content'] is string -%}
      {{- message['content'] | replace('<image>\\n', '<image>') -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that build each word from the left, after its leading space; all start there, so none disturbs another."""
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(set(words)):
        built = "Ġ"
        for letter in word:
            merges[(built, letter)] = None
            built += letter
    return list(merges)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Tokenizer for text of `words` (letters only), digits one by one, and any other bytes."""
    merges = word_merges(words)
    special = [*SPECIAL.values(), USER, ASSISTANT]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*special, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL["pad_token"],
        bos_token=SPECIAL["bos_token"],
        eos_token=SPECIAL["eos_token"],
        extra_special_tokens={"image_token": SPECIAL["image_token"]},
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )
