"""Language models of several families speak within a fused model as they do by themselves, or are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moe_vision.config import validate
from moe_vision.modeling.compose import compose
from moe_vision.modeling.model_config import ModelConfig
from tests.tiny import tiny_tokenizer, tiny_values

DECODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
OPT = {
    "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DECODER, "qwen3": DECODER, "mistral": DECODER, "phi3": DECODER, "gemma3_text": {**DECODER, "head_dim": 16},
    "olmo2": DECODER, "smollm3": DECODER, "stablelm": DECODER, "gpt_neox": DECODER, "gpt2": GPT, "opt": OPT,
}  # fmt: skip


def saved(folder: Path, family: str, tied: bool = True, **values: Any) -> Any:
    """A causal language model with random weights and the tests' tokenizer, in a folder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **values)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def composed(folder: Path) -> Any:
    values = tiny_values(("clip",), language_model={"pretrained": str(folder)})
    return compose(validate(ModelConfig, values, source="families"))[0].eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_speaks_as_it_did(family: str, tied: bool, tmp_path: Path) -> None:
    causal = saved(tmp_path, family, tied, **FAMILIES[family])
    model = composed(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, causal(ids).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.resize_token_embeddings(causal.config.vocab_size + 5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path / "fused")
    again = type(model).from_pretrained(tmp_path / "fused").eval()
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_text_decoder_of_a_multimodal_folder(tmp_path: Path) -> None:
    """Gemma 3 from 4B on is published with its own vision tower, which a fused model leaves out."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = {**DECODER, "head_dim": 16, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    native = AutoModelForImageTextToText.from_config(config).eval()
    native.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, ids = composed(tmp_path), torch.arange(5, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, native(ids).logits)


@pytest.mark.parametrize(
    ("family", "values", "cause"),
    [("phi", DECODER, "differ from its own by up to"),
     ("gemma2", {**DECODER, "head_dim": 16}, "final_logit_softcapping"),
     ("granite", {**DECODER, "logits_scaling": 2.0}, "logits_scaling"),
     ("cohere2", {**DECODER, "logit_scale": 0.5}, "logit_scale"),
     ("opt", {**OPT, "word_embed_proj_dim": 16}, "embeds its tokens in 16 values and widens them to 32"),
     ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "keeps a state")],
)  # fmt: skip
def test_a_family_that_cannot_be_fused_is_refused(
    family: str, values: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    saved(tmp_path, family, **values)
    with pytest.raises(ValueError, match=rf"{cause}.*choose another language model"):
        composed(tmp_path)


def test_a_quantised_language_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", **DECODER)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"is quantised \(quantization_config .*choose the folder"):
        composed(tmp_path)
