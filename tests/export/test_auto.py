"""transformers' Auto classes on an exported folder, without moe_vision and with it."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import moe_vision
from moe_vision.export import verify
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.bundle import AUTO_MAP
from moe_vision.modeling.compose import load
from tests.export.conftest import Exported
from tests.export.isolated import isolated
from tests.export.scripts.folder import picture, prompt
from tests.tiny import tiny_model

REMOTE = "ValueError: True"


def expected_of(source: Path, file: Path) -> Path:
    """A prompt's inputs and what the source model makes of them."""
    model, processor = load(source)
    inputs = processor(images=[picture()], text=prompt(processor, "What is this?"), return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    save_file({name: value.contiguous() for name, value in {**inputs, "logits": logits}.items()}, file)
    return file


@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_auto_classes_without_moe_vision(name: str, micro: Exported, tiny: Exported, tmp_path: Path) -> None:
    found, other = (micro, tiny) if name == "micro" else (tiny, micro)
    expected = expected_of(found.source, tmp_path / "expected.safetensors")
    seen = isolated("auto_classes", found.folder, other.folder, expected, tmp_path, home=tmp_path / "home")
    assert seen["refusals"] == {
        "AutoConfig": REMOTE, "AutoImageProcessor": REMOTE, "AutoProcessor": REMOTE, "AutoModel": REMOTE,
        "AutoModelForImageTextToText": REMOTE, "AutoModelForMultimodalLM": REMOTE,
        "AutoTokenizer": "TokenizersBackend",  # which is transformers' own and needs no code
    }  # fmt: skip
    assert not seen["ran_code"]
    assert seen["classes"] == {
        "AutoConfig": "MoeVisionConfig", "AutoImageProcessor": "MoeVisionImageProcessor",
        "AutoProcessor": "MoeVisionProcessor", "AutoTokenizer": "TokenizersBackend", "AutoModel": "MoeVisionModel",
        "AutoModelForImageTextToText": "MoeVisionForConditionalGeneration",
        "AutoModelForMultimodalLM": "MoeVisionForConditionalGeneration",
    }  # fmt: skip
    assert seen["modules"] == 1 and seen["config_class"]
    assert not any(seen["loading_info"].values())
    assert seen["difference"] == seen["after_saving"] == seen["beside"] == 0
    assert seen["different"] == [] and seen["identical"] == seen["files"]
    assert seen["same_code"] and seen["saved_auto_map"] == AUTO_MAP
    assert not seen["other_class"] and seen["same_class_twice"]
    assert seen["tied"] == seen["tied_by_config"] != seen["head_saved"]
    for dtype, values in seen["dtypes"].items():
        assert values == {"found": [dtype], "finite": True}


def test_installed_classes_write_folders_that_need_no_package(tiny: Exported, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny.folder)
    processor = AutoProcessor.from_pretrained(tiny.folder)
    assert type(model) is MoeVisionForConditionalGeneration and type(processor) is MoeVisionProcessor
    processor.save_pretrained(tmp_path / "saved")
    alone = (tmp_path / "saved" / "modeling_moe_vision.py").read_text()
    assert "class ClipExpert" not in alone and "class NoSlicing" in alone
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert "class ClipExpert" in (tmp_path / "saved" / "modeling_moe_vision.py").read_text()
    seen = verify(tmp_path / "saved")
    assert seen["max_difference"] == 0 and "transformers_modules" in seen["model_class"]
    for name in ("config.json", "modeling_moe_vision.py", "processor_config.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tiny.folder / name).read_bytes()


def test_a_lost_tensor_fails_verification(tiny: Exported, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny.folder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights.pop(next(name for name in weights if ".experts.sam." in name))
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        verify(damaged)


def test_pickled_weights_are_read_only_on_demand(tiny: Exported, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny.folder, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(pickled)
    asked: Any = AutoModelForImageTextToText.from_pretrained(pickled, use_safetensors=False)
    source, _ = load(tiny.source)
    assert all(torch.equal(value, asked.state_dict()[name]) for name, value in source.state_dict().items())


def test_the_function_is_called_by_its_name_again_and_again(tiny: Exported, tmp_path: Path) -> None:
    assert isinstance(moe_vision.export, ModuleType)  # as everything that imports it leaves it
    for _ in range(2):
        with pytest.raises(ValueError, match="dtype 'bf16'"):
            moe_vision.export(tiny.source, tmp_path / "folder", dtype="bf16")


def test_a_generation_parameter_in_the_config_is_refused(tmp_path: Path) -> None:
    model, _ = tiny_model(("clip",))
    model.config.top_k = 3
    with pytest.raises(ValueError, match="top_k"):
        model.save_pretrained(tmp_path)


def test_a_folder_of_a_later_format_is_refused(tiny: Exported, tmp_path: Path) -> None:
    later = shutil.copytree(tiny.folder, tmp_path / "later")
    config = json.loads((later / "config.json").read_text())
    assert config["moe_vision_format"] == 1
    (later / "config.json").write_text(json.dumps({**config, "moe_vision_format": 2}))
    with pytest.raises(ValueError, match="moe_vision_format 2; this code reads up to 1: upgrade moe-vision"):
        load(later)
