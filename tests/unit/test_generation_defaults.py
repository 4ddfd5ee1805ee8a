"""Fused models keep their language model's generation config: they stop, pad and sample as it does on text."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as library_logging

from moe_vision.config import validate
from moe_vision.data.records import Turn
from moe_vision.evaluation import generate
from moe_vision.export import export
from moe_vision.modeling.compose import compose, load, save
from moe_vision.modeling.model_config import ModelConfig
from tests.tiny import tiny_tokenizer, tiny_values
from tests.unit.test_language_models import DECODER

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


def language_model(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, rows: int = 0, **values: Any
) -> Any:
    """A causal language model with random weights and the tests' tokenizer in a folder, as transformers reads it.

    rows: of the embeddings, in addition to the tokenizer's tokens. values: of its config.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**DECODER, **special, "vocab_size": len(tokenizer) + rows, **values})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default initialisation is so small that every answer would look alike
        for parameter in model.parameters():
            parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_defaults(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def composed(folder: Path, **language: Any) -> tuple[Any, Any]:
    values = tiny_values(("clip",), language_model={"pretrained": str(folder), **language})
    model, processor = compose(validate(ModelConfig, values, source="defaults"))
    return model.eval(), processor


def without_suppressed(model: Any, token: int) -> Any:
    """The native model, which must not generate the fused model's image token either."""
    model.generation_config.suppress_tokens = [token]
    return model


PROMPTS = (torch.arange(5, 12)[None], torch.tensor([[8, 30, 9, 21]]))


def ends(native: Any, **settings: Any) -> list[int]:
    """A token that the native model generates early for each prompt: end tokens that matter."""
    output = [native.generate(prompt, max_new_tokens=12, eos_token_id=None, **settings) for prompt in PROMPTS]
    return [int(row[0, prompt.shape[1] + 3]) for row, prompt in zip(output, PROMPTS, strict=True)]


@pytest.mark.parametrize("through", ["compose", "load", "export"])
def test_text_is_generated_as_the_language_model_does(through: str, tmp_path: Path) -> None:
    native = language_model(tmp_path / "language", tie_word_embeddings=False)
    eos = ends(native, do_sample=False, suppress_tokens=[3])
    write_defaults(tmp_path / "language", bos_token_id=1, eos_token_id=eos, pad_token_id=0, **SAMPLING)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    model, processor = composed(tmp_path / "language")
    if through != "compose":
        save(model, processor, tmp_path / "model")
        model, processor = load(tmp_path / "model")
    if through == "export":
        export(tmp_path / "model", tmp_path / "export")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", trust_remote_code=True)
        model = loaded.eval()
    without_suppressed(native, processor.image_token_id)
    native.generation_config.eos_token_id = [*eos, 2]  # the tokenizer's, which ends the answers that are learnt
    lengths = []
    for prompt in PROMPTS:
        for settings in ({}, {"do_sample": False}):
            torch.manual_seed(7)
            expected = native.generate(prompt, max_new_tokens=12, **settings)
            torch.manual_seed(7)
            assert torch.equal(model.generate(prompt, max_new_tokens=12, **settings), expected)
            lengths.append(expected.shape[1] - prompt.shape[1])
    assert min(lengths) < 12
    kept = model.generation_config.to_dict()
    assert {key: kept[key] for key in SAMPLING} == SAMPLING
    assert (kept["eos_token_id"], kept["pad_token_id"], kept["bos_token_id"]) == ([*eos, 2], 0, 1)


def test_answers_are_greedy_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    language_model(tmp_path / "plain")
    language_model(tmp_path / "sampling")
    write_defaults(tmp_path / "plain", eos_token_id=2)
    defaults = {**SAMPLING, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "max_length": 40, "min_length": 3}
    write_defaults(tmp_path / "sampling", eos_token_id=2, **defaults)
    prompts = [([Turn("user", question)], []) for question in ("which is red", "how many")]
    expected = generate(*composed(tmp_path / "plain"), prompts, 12)
    model = composed(tmp_path / "sampling")
    library_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            assert generate(*model, prompts, 12) == expected
    finally:
        library_logging.disable_propagation()
    assert not caplog.messages


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, {"eos_token_id": [2], "pad_token_id": 0, "bos_token_id": 1}),
     ({"eos_token_id": 5}, {"eos_token_id": [5, 2]}),
     ({"eos_token_id": [5, 6], "pad_token_id": 5}, {"eos_token_id": [5, 6, 2], "pad_token_id": 0}),  # 5 is a word
     ({"pad_token_id": 1}, {"pad_token_id": 1}),
     ({"eos_token_id": [2, 100000], "pad_token_id": -1}, {"eos_token_id": [2], "pad_token_id": 0}),
     ({"suppress_tokens": [9]}, {"suppress_tokens": [9, 3]}),
     ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"temperature": None, "max_length": 4096}),
     ({"max_new_tokens": 64, "max_length": 4096}, {"max_new_tokens": 64, "max_length": None}),
     ({"min_p": 0.1, "do_sample": True}, {"min_p": 0.1, "do_sample": True})],
)  # fmt: skip
def test_what_is_kept_is_saved(own: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    language_model(tmp_path / "language")
    write_defaults(tmp_path / "language", **own)
    model, processor = composed(tmp_path / "language")
    save(model, processor, tmp_path / "model")
    kept = load(tmp_path / "model")[0].generation_config
    assert {key: getattr(kept, key) for key in expected} == expected
    assert kept.to_dict() == model.generation_config.to_dict()


def test_end_tokens_of_a_config_without_generation_config(tmp_path: Path) -> None:
    language_model(tmp_path / "language", eos_token_id=[7, 9], pad_token_id=None)
    (tmp_path / "language" / "generation_config.json").unlink()
    kept = composed(tmp_path / "language")[0].generation_config
    assert (kept.eos_token_id, kept.pad_token_id) == ([7, 9, 2], 0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[1]", "holds a JSON list"), ('{"eos_token_id"', "cannot be read as JSON"),
     ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>': write a token id"),
     ('{"max_new_tokens": -5}', "max_new_tokens")],
)  # fmt: skip
def test_unusable_defaults_are_refused(content: str, problem: str, tmp_path: Path) -> None:
    language_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config\.json'.*{problem}"):
        composed(tmp_path)


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    language_model(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / name).is_file():
            values = json.loads((tmp_path / name).read_text())
            (tmp_path / name).write_text(json.dumps({k: v for k, v in values.items() if k != "pad_token"}))
    write_defaults(tmp_path, eos_token_id=2)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    model, processor = composed(tmp_path)
    assert (processor.tokenizer.pad_token_id, model.generation_config.pad_token_id) == (2, 2)
    prompts = [([Turn("user", question)], []) for question in ("which is red", "how many of a b c d")]
    alone = [generate(model, processor, [prompt], 8)[0] for prompt in prompts]
    assert generate(model, processor, prompts, 8) == alone


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [0, 64])
def test_vocabularies_of_another_size_than_the_embeddings(rows: int, tied: bool, tmp_path: Path) -> None:
    """The image token is new to the tokenizer: a padded embedding has a row for it, another one gets one more."""
    native = language_model(tmp_path / "language", rows=rows, tie_word_embeddings=tied)
    model, processor = composed(tmp_path / "language", image_token="<image>")
    size = native.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "language")
    tokenizer.add_tokens([f"<new{number}>" for number in range(20)])
    tokenizer.save_pretrained(tmp_path / "language")
    model, processor = composed(tmp_path / "language")
    largest = max(processor.tokenizer.get_vocab().values()) + 1
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == max(size, largest)
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        expected = native(ids).logits
        torch.testing.assert_close(model(ids).logits[..., :size], expected, rtol=0, atol=0)
        save(model, processor, tmp_path / "model")
        again = load(tmp_path / "model")[0]
        torch.testing.assert_close(again(ids).logits[..., :size], expected, rtol=0, atol=0)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_folder_in_bfloat16(family: str, tmp_path: Path) -> None:
    """It is composed and saved in fp32 with its exact values. Gemma's scale of embeddings must not be rounded."""
    native = language_model(tmp_path / "language", family, torch.bfloat16, hidden_size=40, head_dim=16)
    assert json.loads((tmp_path / "language" / "config.json").read_text())["dtype"] == "bfloat16"
    model, processor = composed(tmp_path / "language")
    save(model, processor, tmp_path / "model")
    again = load(tmp_path / "model")[0]
    ids = torch.arange(4, 40)[None]
    for fused in (model, again):
        assert {parameter.dtype for parameter in fused.parameters()} == {torch.float32}
        with torch.inference_mode():
            assert torch.equal(fused(ids).logits, native(ids).logits)
    half = load(tmp_path / "model", torch.bfloat16)[0]
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    own = half.model.language_model.state_dict()
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "language").base_model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in stored.items())  # not rounded on the way
