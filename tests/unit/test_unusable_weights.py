"""Weights that no training leaves, and files of a model folder that contradict each other, are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_vision.config import validate
from moe_vision.experts import EXPERTS
from moe_vision.experts.weights import load_expert_weights
from moe_vision.modeling.compose import compose, load, save
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training.prealign import digest_of, load_aligned, save_expert
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model, tiny_values
from tests.unit.test_generation_defaults import language_model

Change = Callable[[torch.Tensor], torch.Tensor]


def with_one(value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[5] = value
        return changed

    return change


UNUSABLE: dict[str, tuple[Change, str]] = {
    "integers": (lambda tensor: (tensor * 100).to(torch.int64), "is (I64|int64) instead of floating point: give"),
    "bytes": (lambda tensor: (tensor * 100).to(torch.int8), "is (I8|int8) instead"),
    "booleans": (lambda tensor: tensor > 0, "is (BOOL|bool) instead"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "is (C64|complex64) instead"),
    "quantised": (lambda tensor: tensor.to(torch.float8_e4m3fn), "is (F8_E4M3|float8_e4m3fn) instead"),
    "nan": (with_one(float("nan")), r"has nan at \[0, 5.*\(1 of \d+ values are not finite\).*fetch"),
    "infinity": (with_one(float("-inf")), r"has -inf at \[0, 5"),
    "zeros": (torch.zeros_like, "is zero everywhere.*fetch it again"),
}


def change_file(path: Path, key: str, change: Change) -> None:
    weights = load_file(path)
    save_file(weights | {key: change(weights[key]).contiguous()}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def expert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("expert") / "clip.safetensors"
    expert = EXPERTS["clip"](variant="micro", pretrained=None).build()
    save_file({f"model.{key}": value.contiguous() for key, value in expert.model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("kind", list(UNUSABLE))
@pytest.mark.parametrize("form", ["safetensors", "pickle", "folder of shards"])
def test_expert_weights(form: str, kind: str, expert_file: Path, tmp_path: Path) -> None:
    change, problem = UNUSABLE[kind]
    key = "model.encoder.layers.1.mlp.fc1.weight"
    weights = load_file(expert_file)
    weights[key] = change(weights[key])
    name, source = "weights.safetensors", tmp_path / "weights.safetensors"
    if form == "safetensors":
        save_file(weights, source)
    elif form == "pickle":
        name, source = "weights.pth", tmp_path / "weights.pth"
        torch.save({"model": weights}, source)
    else:
        first = {k: v for k, v in weights.items() if k != key}
        save_file(first, tmp_path / "model-00001-of-00002.safetensors")
        save_file({key: weights[key]}, tmp_path / "model-00002-of-00002.safetensors")
        files = {k: f"model-0000{1 + (k == key)}-of-00002.safetensors" for k in weights}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        name, source = "model-00002-of-00002.safetensors", tmp_path
    expert = EXPERTS["clip"](variant="micro", pretrained=None).build()
    before = {name: value.clone() for name, value in expert.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name}': {key} ({problem})"):
        load_expert_weights(expert, str(source))
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())


def test_a_part_of_a_stored_tensor_is_named_as_stored(tmp_path: Path) -> None:
    """timm joins three projections; NaN in the second is found in the joined tensor."""
    import timm

    model: Any = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", depth=1, embed_dim=32, num_heads=2, mlp_ratio=2, img_size=64
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["blocks.0.attn.qkv.weight"][40, 3] = float("nan")
    save_file(state, tmp_path / "timm.safetensors")
    architecture = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "image_size": 64, "patch_size": 16}  # fmt: skip
    expert = EXPERTS["clip"](variant="vit_large_patch14_336", pretrained=None, architecture=architecture).build()
    with pytest.raises(ValueError, match=r"timm\.safetensors': blocks\.0\.attn\.qkv\.weight has nan"):
        load_expert_weights(expert, str(tmp_path / "timm.safetensors"))


def test_a_pickle_without_a_state_dict(tmp_path: Path) -> None:
    expert = EXPERTS["clip"](variant="micro", pretrained=None).build()
    for content, problem in (([1, 2], "holds a list"), ({"model": {"a": "text"}}, "'a' is a str")):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=rf"weights\.pth'.*{problem}.*give a file with a state dict"):
            load_expert_weights(expert, str(tmp_path / "weights.pth"))


def composed(folder: Path) -> Any:
    values = tiny_values(("clip",), language_model={"pretrained": str(folder)})
    return compose(validate(ModelConfig, values, source="unusable"))


@pytest.mark.parametrize("kind", list(UNUSABLE))
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_of_a_language_model(tensor: str, kind: str, tmp_path: Path) -> None:
    language_model(tmp_path, tie_word_embeddings=False)
    change, problem = UNUSABLE[kind]
    change_file(tmp_path / "model.safetensors", tensor, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors': {tensor} ({problem})"):
        composed(tmp_path)


def test_a_norm_of_zeros(tmp_path: Path) -> None:
    """Llama's norms begin with ones, Gemma's with zeros, to which one is added."""
    language_model(tmp_path / "gemma", "gemma3_text", head_dim=16)
    change_file(tmp_path / "gemma" / "model.safetensors", "model.norm.weight", torch.zeros_like)
    composed(tmp_path / "gemma")
    language_model(tmp_path / "llama")
    change_file(tmp_path / "llama" / "model.safetensors", "model.norm.weight", torch.zeros_like)
    with pytest.raises(ValueError, match=r"model\.safetensors': model\.norm\.weight is zero everywhere"):
        composed(tmp_path / "llama")


def test_a_language_model_that_lacks_weights(tmp_path: Path) -> None:
    language_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: .*layers\.1\.mlp\.up_proj\.weight"):
        composed(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", '{"a": ', "[" * 5000])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_of_the_wrong_kind_in_a_language_model(name: str, content: str, tmp_path: Path) -> None:
    language_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*: restore"):
        composed(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("config.json", "vocab_size", 0), ("config.json", "hidden_act", "nonsense"), ("tokenizer.json", "model", 7),
     ("tokenizer.json", "added_tokens", 3), ("tokenizer.json", "post_processor", {"type": "nonsense"}),
     ("tokenizer_config.json", "eos_token", 7), ("tokenizer_config.json", "extra_special_tokens", "x")],
)  # fmt: skip
def test_values_of_the_wrong_kind_in_a_language_model(file: str, key: str, value: Any, tmp_path: Path) -> None:
    language_model(tmp_path)
    change_json(tmp_path / file, key, value=value)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        composed(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(*tiny_model(("clip", "sam")), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("kind", list(UNUSABLE))
@pytest.mark.parametrize(
    "tensor",
    ["model.language_model.layers.0.mlp.up_proj.weight", "model.multi_modal_projector.overview.layers.0.weight",
     "model.vision_tower.experts.clip.model.encoder.layers.0.mlp.fc1.weight"],
)  # fmt: skip
def test_weights_of_a_model_folder(tensor: str, kind: str, folder: Path) -> None:
    change, problem = UNUSABLE[kind]
    change_file(folder / "model.safetensors", tensor, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors': {tensor} ({problem})"):
        load(folder)


@pytest.mark.parametrize("kind", list(UNUSABLE))
def test_weights_of_an_aligned_expert(kind: str, tmp_path: Path) -> None:
    model = tiny_model(("clip",))[0]
    path = tmp_path / "clip.safetensors"
    save_expert(model, "clip", path, "digest")
    change, problem = UNUSABLE[kind]
    weights = load_file(path)
    (key,) = (key for key in weights if key.endswith("layers.1.mlp.fc1.weight"))
    changed = weights | {key: change(weights[key]).contiguous()}
    metadata = {"format": "pt", "aligned_by": "digest", "xxh3": digest_of(changed)}  # as if training had written them
    save_file(changed, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"clip\.safetensors': {key} ({problem})"):
        load_aligned(model, "clip", path, "digest")


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_zeros_that_a_module_begins_with_are_no_fault(name: str, tmp_path: Path) -> None:
    model, processor = tiny_model(**COMPOSITIONS[name])
    save(model, processor, tmp_path)
    again = load(tmp_path)[0].state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null", "true", '{"a": ', "\x00", "[" * 5000])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json",
             "tokenizer.json"],
)  # fmt: skip
def test_json_of_the_wrong_kind(name: str, content: str, folder: Path) -> None:
    assert (folder / name).is_file()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*: (restore|give)"):
        load(folder)


def change_json(path: Path, *keys: str, value: Any) -> Any:
    values = json.loads(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    before = inner.get(keys[-1])
    inner[keys[-1]] = value
    path.write_text(json.dumps(values))
    return before


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [("config.json", ("text_config",), 3), ("config.json", ("vision_config",), [1]),
     ("config.json", ("vision_config", "experts"), "clip"), ("config.json", ("vision_config", "branches"), []),
     ("config.json", ("text_config", "hidden_size"), "wide"),
     ("config.json", ("text_config", "model_type"), "nonsense"),
     ("config.json", ("model_type",), "llama"), ("config.json", ("image_token_id",), "<image>"),
     ("config.json", ("moe_vision_format",), "new"), ("generation_config.json", ("eos_token_id",), "</s>"),
     ("processor_config.json", ("image_processor",), 4),
     ("processor_config.json", ("image_processor", "slicing"), {"type": "nonsense"}),
     ("tokenizer.json", ("model",), 7), ("tokenizer.json", ("added_tokens",), {"a": 1}),
     ("tokenizer_config.json", ("extra_special_tokens",), "x")],
)  # fmt: skip
def test_values_of_the_wrong_kind(file: str, keys: tuple[str, ...], value: Any, folder: Path) -> None:
    change_json(folder / file, *keys, value=value)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("slicing", {"type": "none", "size": [64, 64]}), ("do_rescale", False), ("do_normalize", True),
     ("rescale_factor", 0.5), ("do_convert_rgb", False)],
)  # fmt: skip
def test_a_processor_that_contradicts_the_config(key: str, value: Any, folder: Path) -> None:
    before = change_json(folder / "processor_config.json", "image_processor", key, value=value)
    pattern = rf"processor_config\.json': image_processor\.{key} is .*, and the model of config\.json takes .*: restore"
    with pytest.raises(ValueError, match=pattern) as raised:
        load(folder)
    for given in (value, before):
        plain = given if not isinstance(given, dict) else given["type"]
        assert str(plain) in str(raised.value)


def test_a_tokenizer_that_contradicts_the_config(folder: Path) -> None:
    change_json(folder / "config.json", "image_token_id", value=7)
    with pytest.raises(ValueError, match=r"image_token '<image>' has id 3, and image_token_id in config\.json is 7"):
        load(folder)


def test_an_index_that_names_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    keys = load_file(folder / "model-00001-of-00002.safetensors")
    for name, problem in (
        ("model-00002-of-00002.safetensors", "is not there"), ("../secret.safetensors", "outside its folder"),
        ("/secret.safetensors", "outside its folder"),
    ):  # fmt: skip
        index = {"weight_map": dict.fromkeys(keys, "model-00001-of-00002.safetensors") | {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=rf"index\.json' names .*{problem}.*fetch the folder again"):
            load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match="weight_map must be an object"):
        load(folder)


@pytest.mark.parametrize("cut", [0, 4, 1000])
def test_cut_weights(cut: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors.*restore"):
        load(folder)
