"""The exported folder, and the file that many modules become."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from moe_vision.export import ExportError, FlattenError, export, flatten
from moe_vision.export import hf as export_hf
from moe_vision.export.flatten import collect
from moe_vision.modeling import MoeVisionForConditionalGeneration
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    model, processor = tiny_model(("clip", "eva02", "pix2struct"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "export"
    report = export(source, folder, metrics={"ocr": 0.5}, max_shard_size="500KB")
    assert report.max_logit_difference == 0.0
    return folder


def test_folder_has_what_it_needs_and_no_pickle(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "modeling_moe_vision.py", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors.index.json" in names
    assert not [name for name in names if name.endswith((".bin", ".pth", ".pkl", ".pt"))]
    auto_map = json.loads((exported / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "modeling_moe_vision.MoeVisionForConditionalGeneration"
    assert "| ocr | 0.500 |" in (exported / "README.md").read_text()
    assert list(exported.parent.iterdir()) == [exported]


def test_only_the_used_families_are_in_the_file(exported: Path) -> None:
    code = (exported / "modeling_moe_vision.py").read_text()
    classes = {node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef)}
    assert {"ClipExpert", "Eva02Expert", "Pix2StructExpert", "ChannelConcat", "Mlp"} <= classes
    assert not {"SamExpert", "ConvNextExpert"} & classes
    assert "moe_vision." not in code.replace("moe_vision.safetensors", "")
    assert not [line for line in code.splitlines() if line.lstrip().startswith("from .")]


def test_flatten_is_reproducible() -> None:
    model, _ = tiny_model()
    assert flatten(model.config) == flatten(model.config)


def test_installed_package_loads_it_without_remote_code(exported: Path, source: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    assert type(model) is MoeVisionForConditionalGeneration
    original = MoeVisionForConditionalGeneration.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(exported)
    batch = processor(
        images=torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8), text="<image>read", return_tensors="pt"
    )
    assert torch.equal(model(**batch).logits, original(**batch).logits)


def test_a_failing_self_test_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = export_hf.flatten
    monkeypatch.setattr(export_hf, "flatten", lambda config: good(config).replace("mode=\"bilinear\"", "mode=\"nearest\""))
    with pytest.raises(ExportError, match="nothing was written"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export_hf, "flatten", lambda config: "import not_a_module\n" + good(config))
    with pytest.raises(ExportError, match="does not load without moe_vision"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_dtype_and_wrong_source(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dtype 'half': choose from float32"):
        export(source, tmp_path / "out", dtype="half")
    with pytest.raises(ValueError, match="is no model folder"):
        export(tmp_path, tmp_path / "out")


def test_bfloat16(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", dtype="bfloat16")
    model = MoeVisionForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import pandas\n", r"mine.py:1: imports 'pandas', which an exported model may not need"),
        ("def f():\n    import json\n", r"mine.py:2: imports inside a function"),
        ("from moe_vision.types import FeatureMap as Map\n", "by `from … import name`, unrenamed"),
        ('X = """\nfrom . import y\n"""\n', "a line starts with `from .`"),
        ("from moe_vision.experts import EXPERTS\n", "imports from a package, experts"),
    ],
)
def test_sources_that_cannot_be_flattened(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(FlattenError, match=message):
        collect(tmp_path / "mine.py", {}, ())
