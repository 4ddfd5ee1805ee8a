"""An exported folder: complete, proven without the package, equal with it, and never half written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from moe_vision.export import ExportError, ExportReport, export, hf
from moe_vision.modeling import MoeVisionForConditionalGeneration
from moe_vision.modeling.bundle import AUTO_MAP
from tests.tiny import tiny_model

ALL = ("clip", "convnext", "pix2struct", "eva02", "sam")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output with its model/ folder, all five experts."""
    folder = tmp_path_factory.mktemp("run")
    model, processor = tiny_model(ALL)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    destination = tmp_path_factory.mktemp("exports") / "folder"
    return export(run, destination, max_shard_size="1MB", metrics={"accuracy": {"colour": 0.25}})


def test_selftest_saw_equal_logits(report: ExportReport) -> None:
    assert report.max_difference == 0
    assert report.new_tokens >= 1
    assert report.dtype == "float32"


def test_folder_is_complete(report: ExportReport) -> None:
    folder = Path(report.destination)
    for name in (
        "config.json", "generation_config.json", "modeling_moe_vision.py", "processor_config.json",
        "tokenizer.json", "chat_template.jinja", "README.md", "model.safetensors.index.json",
    ):  # fmt: skip
        assert name in report.files
    assert not [name for name in report.files if Path(name).suffix in hf.PICKLES]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    card = (folder / "README.md").read_text()
    assert "| accuracy.colour | 0.25 |" in card and "| eva02 | eva02 | micro |" in card


def test_installed_package_loads_the_folder_without_remote_code(run: Path, report: ExportReport) -> None:
    ours, info = AutoModelForImageTextToText.from_pretrained(report.destination, output_loading_info=True)
    assert type(ours) is MoeVisionForConditionalGeneration
    assert not any(info.values())
    source = MoeVisionForConditionalGeneration.from_pretrained(run / "model").eval()
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[ours.config.image_token_id] * 4, 9, 10]])
    assert torch.equal(ours.eval()(ids, pixels).logits, source(ids, pixels).logits)


def test_export_in_bfloat16(run: Path, tmp_path: Path) -> None:
    result = export(run, tmp_path / "half", dtype="bfloat16")
    assert result.dtype == "bfloat16"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_failing_selftest_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "flatten", lambda config, plugins: "from moe_vision.types import MapShape\n")
    with pytest.raises(ExportError, match="failed the self-test"):
        export(run, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_belong_are_refused(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (run / "model").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = load_file(damaged / "model.safetensors")
    weights.pop(next(name for name in weights if ".experts.sam." in name))
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        export(damaged, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_destination_is_kept_unless_told(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export(run, tmp_path)
    with pytest.raises(ExportError, match="is no export"):
        export(run, tmp_path, overwrite=True)
    with pytest.raises(ExportError, match="holds the source"):
        export(run, run / "model", overwrite=True)
    assert precious.read_text() == "mine"
