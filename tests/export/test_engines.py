"""What vLLM and lmms-eval ask of a folder. `versions.py` runs the engines themselves, and other transformers."""

import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from moe_vision.interop import lmms_eval as plugin
from moe_vision.modeling.compose import load, save
from tests.export.conftest import Exported
from tests.export.isolated import isolated
from tests.export.scripts.folder import picture, prompt
from tests.sliced import COMPOSITIONS
from tests.tiny import tiny_model

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
SLICED = ("anyres", "uhd, cells")
SELECTOR = "slime, its own adapters and a selector"


def save_engine_folders(home: Path) -> dict[str, Path]:
    """Folders of models that slice, and of one with a selector, by name."""
    folders = {name: home / f"sliced-{number}" for number, name in enumerate((*SLICED, SELECTOR))}
    for name, folder in folders.items():
        save(*tiny_model(**COMPOSITIONS[name]), folder)
    return folders


def check_contract(seen: dict[str, Any]) -> None:
    """Of what scripts/vllm_contract.py saw in a folder: everything is as vLLM wants it."""
    assert seen["resolved"] == seen["base"] == "MoeVisionModel" and seen["same_class"] and seen["is_model"]
    assert seen["compatible"] and seen["multimodal"] and seen["modalities"] == ["image"]
    assert seen["head_in_base"] == []
    assert (seen["decoder"], seen["encoder"]) == ("LlamaModel", "MoeVisionTower") and seen["decoder_is_language_model"]
    assert seen["unknown"] == seen["unfilled"] == []
    assert seen["head_saved"] != seen["tied"]
    assert seen["sharded"] == 7 * seen["layers"] < seen["linear_layers"] and seen["sharded_outside"] == []
    assert seen["head_plan"] == "colwise_gather_output"
    assert seen["pipeline"] == [f"language_model.{name}" for name in ("embed_tokens", "layers", "norm")]
    assert seen["items"] == ["image_sizes", "pixel_values", "placeholders"]
    assert all((tokens, views) == (said, rows) for tokens, views, said, rows in seen["counted"])
    assert all(placeholders == said == tokens for placeholders, said, tokens in seen["together"])
    assert seen["width"][0] == seen["width"][1] and seen["profiled"]["tokens"] >= seen["together"][0][0]
    assert seen["calls_by_experts"] == 0 and seen["calls"] == list(range(seen["layers"]))
    assert seen["difference_alone"] < 1e-5 and seen["difference_beside"] < 1e-5
    assert seen["tuple"] and seen["same_ids"]
    assert seen["difference"] < 1e-4 < 1 < seen["scale"]


@pytest.fixture(scope="module")
def contract(micro: Exported, tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What scripts/vllm_contract.py saw, by folder."""
    home = tmp_path_factory.mktemp("engines")
    folders = {"micro": micro.folder, "tiny": tiny.folder, **save_engine_folders(home)}
    return dict(zip(folders, isolated("vllm_contract", *folders.values(), home=home), strict=True))


@pytest.mark.parametrize("name", ["micro", "tiny", *SLICED])
def test_the_contract_of_vllm(name: str, contract: dict[str, Any]) -> None:
    check_contract(contract[name])
    views = {rows for _, rows, *_ in contract[name]["counted"]}
    assert (len(views) > 1) == (name in SLICED)


def test_vllm_is_refused_where_a_selector_would_not_be_asked(contract: dict[str, Any]) -> None:
    assert "vLLM" in contract[SELECTOR]["refused"] and "branches.selector" in contract[SELECTOR]["refused"]


@dataclass(frozen=True)
class ModelManifest:
    """As lmms_eval.models.registry_v2's."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    """As lmms_eval.api.model's `lmms`, as far as it is inherited."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}


class Huggingface(Lmms):
    """As lmms_eval.models.chat.huggingface's: what it reads of itself to answer, in the same calls."""

    is_simple = False

    def __init__(self) -> None:
        raise AssertionError("this one would load by AutoModel, which has no head")

    def answers(self: Any, batch: list[tuple[str, list[Any]]]) -> tuple[Any, list[str]]:
        turns = [[{"type": "image", "url": i} for i in images] + [{"type": "text", "text": q}] for q, images in batch]
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            for content in turns
        ]
        media = {"images": [image for _, images in batch for image in images], "videos": [], "audios": []}
        assert self.batch_size_per_gpu == len(batch) and self.device_map != "auto" and self.system_prompt is None
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **media).to(self._device)
        output = self.accelerator.unwrap_model(self._model).generate(
            **inputs, eos_token_id=self._tokenizer.eos_token_id, pad_token_id=self._tokenizer.pad_token_id,
            do_sample=False, temperature=None, top_p=None, num_beams=1, max_new_tokens=6, use_cache=self.use_cache,
        )  # fmt: skip
        new = [ids[len(given) :] for given, ids in zip(inputs.input_ids, output, strict=True)]
        return inputs, self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of lmms-eval the plug-in imports."""
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest}, "lmms_eval.models.chat": {},
        "lmms_eval.models.chat.huggingface": {"Huggingface": Huggingface},
    }  # fmt: skip
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(plugin, "chat_class", plugin.chat_class.__wrapped__)


def test_the_plug_in_of_lmms_eval(lmms_eval: None, tmp_path: Path) -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["lmms_eval.models"]
    ((name, value),) = declared.items()
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    module, _, class_name = manifest.chat_class_path.rpartition(".")
    lmm_class: Any = getattr(sys.modules[module], class_name)
    assert (name, manifest.model_id, manifest.simple_class_path) == ("moe_vision", "moe_vision", None)
    assert issubclass(lmm_class, Huggingface) and not lmm_class.is_simple

    model, processor = tiny_model(("clip",))
    start = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    save(model, processor, tmp_path / "model")
    lmm = lmm_class(pretrained=str(tmp_path / "model"), batch_size="2", device="cpu")
    asked = [("which is red", [picture(0), picture(1)]), ("hello", [])]
    inputs, answers = lmm.answers(asked)
    assert ((inputs["input_ids"] == start).sum(1) == 1).all()  # the template's own, and none of the tokenizer's
    again, _ = load(tmp_path / "model")
    for (question, images), answer in zip(asked, answers, strict=True):
        text = prompt(processor, question, len(images))
        alone = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        new = again.generate(**alone, max_new_tokens=6, do_sample=False)[:, alone["input_ids"].shape[1] :]
        assert answer == processor.decode(new[0], skip_special_tokens=True) != ""
    lowered = lmm_class(pretrained=str(tmp_path / "model"), dtype="bfloat16", device="cpu")
    assert {value.dtype for value in lowered._model.parameters()} == {torch.bfloat16}
