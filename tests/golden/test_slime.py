"""SliME's published tensors: its gated mixture, its compressor of tiles, its selector, and all of them in a prompt.

Cases are from yfzhang114/SliME at 5c89ec9, those of the older selector from 6b4e0fe^ (manifest.json says how).
Everything goes through the public path: a config, and weights renamed by the code that imports a checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moe_vision.fusion import ADAPTERS, SELECTORS
from moe_vision.fusion.selector import cosine_mean, cosine_sum
from moe_vision.interop.slime import compressor_weights, mixture_weights
from moe_vision.modeling import MoeVisionConfig, MoeVisionForConditionalGeneration, MoeVisionVisionConfig
from moe_vision.types import TokenShape, VisualTokens

HERE = Path(__file__).parent / "slime"
MANIFEST = json.loads((HERE / "manifest.json").read_text())
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""Below what rounding the positions to 16 bits changes, which is 3e-5."""
IMAGE, SEPARATOR = 31, 7


def golden(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    values = load_file(HERE / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def mixture(**settings: Any) -> Any:
    config = ADAPTERS["gated_mixture"](half_positions=True, **settings)
    adapter = config.build(TokenShape(576, 256, (24, 24)), 64)
    adapter.load_state_dict(mixture_weights(golden("gated_mixture_weights"), config, "golden"))
    return adapter.eval()


@torch.no_grad()
def test_gated_mixture_and_each_adapter_alone() -> None:
    values = golden("gated_mixture_io")
    x = VisualTokens(values["x"][None], (24, 24))
    for only, name in (("mlp", "mlp_only_gated0"), ("resampler", "attn_only_gated1"), (None, "mix_eval")):
        found = mixture(only=only)(x)
        torch.testing.assert_close(found.data[0], values[name], **TOLERANCE)
    torch.testing.assert_close(found.gates[0], values["gates_eval"], **TOLERANCE)
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(1, 576), atol=2e-6, rtol=0)
    # What has another number of tokens passed the published mixture by, through the MLP alone.
    local = mixture().projection(VisualTokens(values["x_local_3x16"])).data
    torch.testing.assert_close(local, values["y_local_3x16"], **TOLERANCE)


def test_gated_mixture_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    values = golden("gated_mixture_io")
    x = VisualTokens(values["x"][None], (24, 24))
    adapter = mixture(published_noise=True).train()
    monkeypatch.setattr(torch, "randn_like", lambda scores: values["train_noise_seed5"].view_as(scores))
    found = adapter(x)
    torch.testing.assert_close(found.gates[0], values["gates_train_seed5"], **TOLERANCE)
    torch.testing.assert_close(found.data[0], values["mix_train_seed5"], **TOLERANCE)
    assert MANIFEST["gated_mixture"]["params_without_grad_in_train"] == ["w_noise"]
    found.data.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    assert "noise" not in dict(adapter.named_parameters())
    ours = mixture().train()  # whose noise is of a size that learns
    ours(x).data.sum().backward()
    assert ours.noise.grad.any()


@torch.no_grad()
def test_compressor_of_tiles() -> None:
    values = golden("local_compressor_io")
    config = ADAPTERS["query_compressor"](num_queries=144, projector="overview", half_positions=True)
    adapter = config.build(TokenShape(576, 256, (24, 24)), 64)
    weights = {f"post_qformer.{key}": value for key, value in golden("local_compressor_weights").items()}
    adapter.load_state_dict(compressor_weights(weights, "golden"))
    found = adapter(VisualTokens(values["x"], (24, 24)))
    assert found.shape == TokenShape(144, 256, (12, 12))
    torch.testing.assert_close(found.data, values["y"], **TOLERANCE)


def cases(file: str) -> list[dict[str, Any]]:
    found = json.loads((HERE / file).read_text())
    return found["cases"] if isinstance(found, dict) else found


def kept(case: dict[str, Any], double_softmax: bool, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices that our selector keeps in a published case."""
    values = golden("selector_io")
    tokens, text = values[f"f_{case['L']}"], values[f"t_{case['T']}"]
    reduce = "sum" if case["mask"] == "mask" else "mean"
    if case["mask"] == "mask":
        text = text[values[f"mask_{case['T']}"].bool()]
    config = SELECTORS["published"](
        top_p=case["topp"], temperature=case["temp"], reduce=reduce, double_softmax=double_softmax
    )
    selector = config.build(48).train(case["mode"].startswith("train"))
    noise = values[f"train_noise_seed123_{case['L']}"]
    monkeypatch.setattr(torch, "randn_like", lambda scores: noise)
    selection = selector(tokens, text, torch.zeros(len(tokens), 2))
    assert torch.equal(selection.tokens, tokens)
    found: list[int] = selection.keep.nonzero()[:, 0].tolist()
    return found


@pytest.mark.parametrize("case", cases("selector_cases.json"), ids=str)
def test_selector_of_today(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = kept(case, False, monkeypatch)
    if case["topp"] >= 1:  # the published sum may round above 1, and drop what it was told to keep
        assert found == list(range(case["L"]))
    else:
        assert found == case["indices"] and len(found) == case["kept"]


@pytest.mark.parametrize("case", cases("selector_cases_legacy.json"), ids=str)
def test_selector_of_the_paper(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = kept(case, True, monkeypatch)
    # The second softmax makes weights nearly equal: rounding decides the last ones (manifest.json).
    assert len(set(found) ^ set(case["indices"])) <= 2


@pytest.mark.parametrize("length", [96, 288, 1008])
def test_scores_are_those_of_all_pairs(length: int) -> None:
    values = golden("selector_io")
    tokens = values[f"f_{length}"]
    for words in (7, 12, 40):
        text, mask = values[f"t_{words}"], values[f"mask_{words}"].bool()
        pairs = F.cosine_similarity(tokens[:, None], text[None], dim=-1)
        torch.testing.assert_close(cosine_sum(tokens, text[mask]), pairs[:, mask].sum(-1), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(cosine_mean(tokens, text), pairs.mean(-1), atol=1e-6, rtol=1e-6)


def whole() -> MoeVisionForConditionalGeneration:
    """SliME in miniature with the golden weights, from CLIP's features on."""
    clip = {"hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    expert = {"name": "clip", "type": "clip", "variant": "vit_large_patch14_336", "layer": -1, "architecture": clip}
    mixer = {"type": "channel_concat", "grid": None}
    branches = {
        "overview": {"mixer": mixer, "adapter": {"type": "gated_mixture", "half_positions": True}},
        "slices": {
            "mixer": mixer,
            "adapter": {"type": "query_compressor", "num_queries": 16, "projector": "overview", "half_positions": True},
        },
    }
    settings = MANIFEST["encode_images"]["config"]
    selector = {"type": "published", "top_p": settings["topp"], "temperature": settings["temp"]}
    slicing = {"type": "slime"}
    vision = MoeVisionVisionConfig([expert], branches, slicing, {"separator": SEPARATOR}, selector)
    text = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    model = MoeVisionForConditionalGeneration(MoeVisionConfig(vision, text, image_token_id=IMAGE)).eval()
    mixture_config = vision.adapter("overview")
    projector = mixture_weights(golden("encode_images_weights", "mm_projector."), mixture_config, "golden")
    model.model.multi_modal_projector["overview"].load_state_dict(projector)
    sampler = compressor_weights(golden("encode_images_weights", "sampler."), "golden")
    model.model.multi_modal_projector["slices"].load_state_dict(sampler)
    model.get_input_embeddings().load_state_dict(golden("encode_images_weights", "embed_tokens."))
    return model


@torch.no_grad()
def test_from_features_to_the_embeddings_of_a_prompt() -> None:
    values, case = golden("encode_images_io_c0", "c0_"), MANIFEST["encode_images"]["cases"][0]
    model = whole()
    width, height = case["image_wh"]
    sizes = torch.tensor([[height, width, 1]] * len(values["clip_feats"]))
    encoded = model.get_image_features(None, sizes, values["clip_feats"], return_dict=True)
    tokens, count = encoded.pooler_output[0], 576 + 1 + case["total_local"]
    torch.testing.assert_close(tokens[:576], values["global"], **TOLERANCE)
    torch.testing.assert_close(tokens[577:], values["local_mosaic"], **TOLERANCE)
    ids = [token for i in case["input_ids"] for token in ([IMAGE] * count if i == -200 else [i])]
    prompt = torch.tensor([ids])
    embeddings = model.get_input_embeddings()(prompt)
    selected, keep = model.model.select(encoded, prompt, embeddings, None)
    assert keep[0][577:].nonzero()[:, 0].tolist() == case["indices"] and keep[0][:577].all()
    torch.testing.assert_close(selected[0][keep[0]], values["image_features"], **TOLERANCE)
    spliced = model.model.splice(prompt, embeddings, selected[0])[0]
    start = case["input_ids"].index(-200)
    valid = torch.cat([torch.ones(start), keep[0], torch.ones(len(ids) - start - count)]).bool()
    torch.testing.assert_close(spliced[valid], values["inputs_embeds"][0], **TOLERANCE)
