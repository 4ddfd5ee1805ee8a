"""Eagle's published towers, preprocessing, projector and splice: its own weights and inputs, its own outputs.

Cases are from NVlabs/Eagle at 783f656 (manifest.json says how). They go through the public path: a config with a
miniature architecture, `build()`, and the weights through the same code that imports a checkpoint. Files that are
too large for this repository are read from `../shared/golden` where that is there.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

from moe_vision.config import apply_override, read_yaml, validate
from moe_vision.experts import EXPERTS, Expert
from moe_vision.experts.base import CLIP_MEAN, CLIP_STD
from moe_vision.experts.weights import load_state
from moe_vision.fusion import ADAPTERS, adapt_grid
from moe_vision.interop.eagle import EXPERTS_OF_TOWERS, expert_weights, our_key
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionImageProcessor, MoeVisionProcessor
from moe_vision.modeling.compose import make_processor
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.modeling.tower import MoeVisionTower
from moe_vision.types import TokenShape, VisualTokens

HERE = Path(__file__).parent / "eagle"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "eagle"
CASES = json.loads((HERE / "manifest.json").read_text())["cases"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
"""Statistics that leave pixels alone: the towers' cases hold pixels that are normalised already."""


def golden(name: str) -> dict[str, torch.Tensor]:
    for folder in (HERE, SHARED):
        if (folder / f"{name}.safetensors").is_file():
            return load_file(folder / f"{name}.safetensors")
    pytest.skip(f"{name}.safetensors is not here")


def clip_architecture(case: dict[str, Any]) -> dict[str, Any]:
    return dict(case)


def convnext_architecture(case: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_sizes": case["dims"], "depths": case["depths"], "num_stages": len(case["dims"])}


def sam_architecture(case: dict[str, Any], image_size: int) -> dict[str, Any]:
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "global_attn_indexes", "output_channels")
    mlp_dim = int(case["hidden_size"] * case["mlp_ratio"])
    return {**{key: case[key] for key in kept}, "mlp_dim": mlp_dim, "image_size": image_size}


def eva02_architecture(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": case["embed_dim"],
        "depth": case["depth"],
        "num_heads": case["num_heads"],
        "window_size": case["window_size"],
        "global_blocks": [i for i in range(case["depth"]) if i not in case["window_block_indexes"]],
    }


def pix2struct_architecture(case: dict[str, Any]) -> dict[str, Any]:
    return dict(case)


def expert(name: str, weights: str, **settings: Any) -> Expert:
    """An expert with the weights of a case."""
    built: Expert = EXPERTS[name](pretrained=None, **settings).build()
    state = golden(weights)
    load_state(built, {key.removeprefix("vision_tower."): value for key, value in state.items()}, weights)
    return built.eval()


@pytest.mark.parametrize("name", ["clip_small_native", "clip_small_up", "clip_336_in336", "clip_336_in448"])
def test_clip(name: str) -> None:
    case, io = CASES[name], golden(f"{name}_io")
    tower = expert(
        "clip", name.rsplit("_", 1)[0] + "_weights", variant="vit_large_patch14_336", class_token=False,
        image_size=case["input_shape"][-2:], architecture=clip_architecture(case["config"]), **PLAIN,
    )  # fmt: skip
    with torch.no_grad():
        output = tower(io["input"]).data.flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, io["output"], **TOLERANCE)


def test_the_clip_case_notices_other_positions_and_a_class_token() -> None:
    case, io = CASES["clip_small_up"], golden("clip_small_up_io")
    settings = {"variant": "vit_large_patch14_336", "class_token": False, "image_size": (84, 84), **PLAIN}
    architecture = clip_architecture(case["config"])
    for change in ({"antialias_positions": False}, {"class_token": True}):
        tower = expert("clip", "clip_small_weights", architecture=architecture, **{**settings, **change})
        with torch.no_grad():
            output = tower(io["input"]).data.flatten(2).transpose(1, 2)
        assert (output - io["output"]).abs().max() > 1e-2


def test_convnext() -> None:
    case, io = CASES["convnext_64"], golden("convnext_64_io")
    tower = expert(
        "convnext", "convnext_weights", variant="xxlarge_clip", image_size=(64, 64),
        architecture=convnext_architecture(case["config"]), **PLAIN,
    )  # fmt: skip
    with torch.no_grad():
        output = tower(io["input"]).data.flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, io["output"], **TOLERANCE)


def test_sam() -> None:
    case, io = CASES["sam_256"], golden("sam_256_io")
    tower = expert(
        "sam", "sam_256_weights", variant="vit_large", neck="short",
        architecture=sam_architecture(case["config"], 256), **PLAIN,
    )  # fmt: skip
    with torch.no_grad():
        output = adapt_grid(tower(io["input"]).data, (8, 8), "pixel_unshuffle")
    torch.testing.assert_close(output, io["output"], **TOLERANCE)


@pytest.mark.parametrize("rope_reference", [16, 8])
def test_eva02(rope_reference: int) -> None:
    case, io = CASES["eva_256"], golden("eva_256_io")
    tower = expert(
        "eva02", "eva_256_weights", variant="large_coco_det", image_size=(256, 256),
        architecture=eva02_architecture(case["config"]) | {"rope_reference": rope_reference}, **PLAIN,
    )  # fmt: skip
    with torch.no_grad():
        output = tower(io["input"]).data
    # Other rotary positions must not pass: the case would notice.
    assert torch.allclose(output, io["output"], **TOLERANCE) == (rope_reference == 16)


@pytest.mark.parametrize("name", ["pix2struct_192", "pix2struct_192_noresize"])
def test_pix2struct(name: str) -> None:
    case, io = CASES[name], golden(f"{name}_io")
    tower = expert(
        "pix2struct", "pix2struct_weights", variant="large", architecture=pix2struct_architecture(case["config"])
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        output = tower(io["input"] * std + mean).data
    if name == "pix2struct_192":
        output = adapt_grid(output, (32, 32), align_corners=True)
    else:
        output = output.flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, io["output"], **TOLERANCE)


def test_projector() -> None:
    case, io = CASES["projector_mlp2x_gelu"], golden("projector_mlp2x_gelu_io")
    width = case["config"]["mm_hidden_size"]
    adapter = ADAPTERS["mlp"](depth=2).build(TokenShape(16, width, (4, 4)), case["config"]["hidden_size"])
    adapter.layers.load_state_dict(golden("projector_weights"))
    with torch.no_grad():
        output = adapter(VisualTokens(io["input"], (4, 4))).data
    torch.testing.assert_close(output, io["output"], atol=1e-5, rtol=1e-4)


def image_processor(fit: str) -> MoeVisionImageProcessor:
    return MoeVisionImageProcessor(
        slicing={"type": "none", "size": [1024, 1024], "fit": fit, "padding_colour": [122, 116, 104]}
    )


@pytest.mark.parametrize("image", ["img_1024", "img_640x480"])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_preprocessing(image: str, fit: str) -> None:
    views = image_processor(fit)(Image.open(HERE / f"{image}.png"), return_tensors="pt")["pixel_values"]
    tower = EXPERTS["clip"](variant="vit_large_patch14_336", pretrained=None, architecture={"num_hidden_layers": 1})
    pixels = tower.build().normalise(views)
    case = golden(f"preprocess_{image}_{'pad' if fit == 'pad' else 'centercrop'}")
    torch.testing.assert_close(pixels[..., ::8, ::8], case["pixel_values_every8"], atol=1e-5, rtol=0)
    for name, crop in case.items():
        if name.startswith("crop_"):
            _, top, left, side = (int(part) if part.isdigit() else 0 for part in name.split("_"))
            found = pixels[..., top : top + side, left : left + side]
            torch.testing.assert_close(found, crop, atol=1e-5, rtol=0)


def released(case: dict[str, Any]) -> ModelConfig:
    """eagle-x5-released.yaml with the miniature architectures of a case."""
    values = read_yaml(packaged_config("model/eagle-x5-released.yaml"))
    towers = [EXPERTS_OF_TOWERS[name] for name in case["vision_tower"].split(";")]
    if "sam" not in towers:
        values = apply_override(values, "experts.sam=null")
    config = case["config"]
    architectures = {
        "clip": clip_architecture(config["clip"]),
        "convnext": convnext_architecture(config["convnext"]),
        "sam": sam_architecture(config["sam"], 1024),
        "eva02": eva02_architecture(config["eva"]),
        "pix2struct": pix2struct_architecture(config["pix"]),
    }
    for name in towers:
        values["experts"][name] |= {"architecture": architectures[name], "pretrained": None}
    values["language_model"] = {"architecture": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}}
    composed = validate(ModelConfig, values, source="case")
    assert list(composed.experts) == towers
    return composed


def vision_tower(case: dict[str, Any]) -> MoeVisionTower:
    tower = MoeVisionTower(released(case).hf_config().vision_config)
    found = expert_weights(golden(Path(case["weights"]).stem), tower.experts, case["weights"])
    tower.load_state_dict({key.removeprefix("model.vision_tower."): value for key, value in found.items()})
    return tower


def image_1024() -> torch.Tensor:
    views: torch.Tensor = image_processor("pad")(Image.open(HERE / "img_1024.png"), return_tensors="pt")["pixel_values"]
    return views


@pytest.mark.parametrize("name", ["concat_x4", "concat_x5"])
def test_concatenation(name: str) -> None:
    case = CASES[name]
    expected = golden(f"{name}_io")["output"]
    with torch.no_grad():
        tokens = vision_tower(case)(image_1024())
    assert tokens.grid == (32, 32)
    torch.testing.assert_close(tokens.data, expected, **TOLERANCE)


def test_gradients() -> None:
    case, manifest = CASES["concat_x5"], CASES["concat_x5_grads"]
    tower, views = vision_tower(case), image_1024().requires_grad_()
    cotangent = golden("concat_x5_gradcotangent")["cotangent"]
    tokens = tower(views).data
    loss = (tokens * cotangent).sum() / tokens.numel()
    loss.backward(retain_graph=True)
    assert loss.item() == pytest.approx(manifest["loss"], abs=1e-5)
    expected = expert_weights(golden("concat_x5_grads") | unbuilt(case), tower.experts, "gradients")
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, parameter in tower.named_parameters():
        reference = expected[f"model.vision_tower.{key}"]
        # A key's bias has no gradient but rounding errors, hence the floor.
        scale = reference.abs().max().clamp(min=1e-4 * largest)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad / scale, reference / scale, atol=2e-3, rtol=1e-3)
    # The published Pix2Struct goes through numpy and so has no gradient to the pixels; ours has.
    views.grad = None
    (tokens[..., :144] * cotangent[..., :144]).sum().div(tokens.numel()).backward()
    assert views.grad is not None
    pixel_grad = views.grad * torch.tensor(CLIP_STD).view(3, 1, 1)
    reference = golden("concat_x5_inputgrad")["input_grad_every16"]
    scale = reference.abs().max()
    torch.testing.assert_close(pixel_grad[..., ::16, ::16] / scale, reference / scale, atol=2e-3, rtol=1e-3)


def unbuilt(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of the case that have no gradient there; ours does not build them, or drops them when importing."""
    gradients, weights = golden("concat_x5_grads"), golden(Path(case["weights"]).stem)
    return {key: torch.zeros_like(value) for key, value in weights.items() if key not in gradients}


def splice_model() -> MoeVisionForConditionalGeneration:
    """Any fused model around the case's Llama of 50 words; its visual tokens are given, not made."""
    text = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    values = {
        "experts": {"clip": {"variant": "micro", "pretrained": None}},
        "branches": {"overview": {"mixer": {"type": "channel_concat", "grid": [2, 2]}, "adapter": {"type": "mlp"}}},
        "language_model": {"architecture": {**text.to_dict(), "model_type": "llama"}},
    }
    model = MoeVisionForConditionalGeneration(validate(ModelConfig, values, source="splice").hf_config(49)).eval()
    state = {our_key(key): value for key, value in golden("splice_weights").items() if "mm_projector" not in key}
    loaded = model.load_state_dict({k: v for k, v in state.items() if "vision_tower" not in k}, strict=False)
    assert not loaded.unexpected_keys and all("language_model" not in key for key in loaded.missing_keys)
    return model


@pytest.mark.parametrize("name", ["splice_right", "splice_right_trunc9", "splice_right_nolabels"])
def test_splice(name: str) -> None:
    io, limit = golden(name), CASES[name]["config"]["model_max_length"]
    rows, labels, features, mask = [], [], [], io["attention_mask"]
    images = iter(io["image_features"])
    for i, ids in enumerate(io["input_ids"]):
        ids = ids[io["attention_mask_in"][i]]
        row = torch.cat([torch.full((4,), 49) if token == -200 else token[None] for token in ids])[:limit]
        for _ in range(int((ids == -200).sum())):
            features.append(next(images))
        if not (ids == -200).any():
            next(images)  # there, a row without an image uses one up all the same
        rows.append(torch.nn.functional.pad(row, (0, mask.shape[1] - len(row))))
    input_ids = torch.stack(rows)
    visual = torch.cat(features)
    kept = torch.cat([torch.ones(int((ids == 49).sum()), dtype=torch.bool) for ids in input_ids])
    if limit is not None:  # what is cut off there ends within the second image of the second row
        kept = torch.cat([torch.ones(8, dtype=torch.bool), torch.ones(2, dtype=torch.bool)])
        visual = visual[: len(kept)]
    model = splice_model()
    embeddings = model.model.splice(input_ids, model.get_input_embeddings()(input_ids), visual)
    torch.testing.assert_close(embeddings[mask], io["inputs_embeds"][mask])
    labels = io.get("labels")
    with torch.no_grad():
        output = model(inputs_embeds=embeddings, attention_mask=mask.long(), labels=labels)
    torch.testing.assert_close(output.logits[mask], io["logits"][mask], atol=1e-5, rtol=1e-4)
    if labels is not None:
        assert output.loss.item() == pytest.approx(CASES[name]["loss"], abs=1e-5)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """The case's pretended tokenizer: a word is 10 + the sum of its letters modulo 97."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: 10 + sum(map(ord, word)) % 97 for word in words} | {"<s>": 1, "<image>": 200, "<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


@pytest.mark.parametrize("sample", CASES["tokenizer_image_token"]["samples"], ids=lambda s: f"{s['bos']}-{s['prompt']}")
def test_prompts_are_tokenised_around_images(sample: dict[str, Any]) -> None:
    tokenizer = word_tokenizer(sample["prompt"].replace("<image>", " ").split())
    config = released(CASES["concat_x5"])
    processor: MoeVisionProcessor = make_processor(config, config.hf_config(200), tokenizer)
    text = ("<s>" if sample["bos"] else "") + sample["prompt"]
    images = [Image.new("RGB", (32, 32))] * text.count("<image>")
    ids = processor(text=text, images=images or None)["input_ids"]
    ids = ids[0] if ids and isinstance(ids[0], list) else ids
    collapsed: list[int] = []
    while ids:
        if ids[0] == 200:
            assert ids[:1024] == [200] * 1024
            collapsed, ids = [*collapsed, -200], ids[1024:]
        else:
            collapsed, ids = [*collapsed, ids[0]], ids[1:]
    assert collapsed == sample["ids"]
