"""Every registered family survives an export, with the settings that change what is built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_vision.config import validate
from moe_vision.export import export
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.compose import load, make_processor, save
from moe_vision.modeling.model_config import ModelConfig
from tests.contract.test_experts import ALL, TINY
from tests.tiny import tiny_tokenizer, tiny_values

SPECIAL: dict[str, dict[str, Any]] = {
    "clip": {"class_token": False, "image_size": [48, 80], "layer": -2},
    "sam": {"neck": "short", "image_size": [64, 128], "mean": [0.1, 0.2, 0.3]},
    "pix2struct": {"sizing": "multiple_of"},
    "eva02": {"resize": "align_corners"},
    "siglip": {"final_norm": False},
}


def composed(experts: list[str]) -> ModelConfig:
    values = tiny_values()
    values["experts"] = {
        name: {"pretrained": None, **TINY.get(name, {"variant": "micro"}), **SPECIAL.get(name, {})} for name in experts
    }
    return validate(ModelConfig, values, source="zoo")


@pytest.mark.parametrize("names", [ALL[: len(ALL) // 2], ALL[len(ALL) // 2 :]], ids=lambda names: "-".join(names))
def test_every_family_survives_an_export(names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, tokenizer = composed(names), tiny_tokenizer()
    image_token_id: Any = tokenizer.convert_tokens_to_ids("<image>")
    hf_config = config.hf_config(image_token_id)
    model = MoeVisionForConditionalGeneration(hf_config).eval()
    processor = make_processor(config, hf_config, tokenizer)
    save(model, processor, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    views = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        expected, found = model.model.vision_tower(views).data, again.model.vision_tower(views).data
    assert torch.equal(found, expected)
    report = export(tmp_path / "model", tmp_path / "export")
    assert report.max_difference == 0 and report.new_tokens >= 1
    code = (tmp_path / "export" / "modeling_moe_vision.py").read_text()
    assert all(f'@EXPERTS.register("{name}")' in code for name in names if name != "contract_plugin")
    assert "key_layouts" not in code
