"""What an export says of itself, where it is pushed to, and what it refuses to hold."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from moe_vision.config import import_plugin
from moe_vision.export import ExportError, FlattenError, export, hf
from moe_vision.export.card import leaves, results_table, training_of
from moe_vision.modeling import MoeVisionProcessor
from moe_vision.modeling.compose import save
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from tests.export.conftest import Exported
from tests.tiny import tiny_model
from tests.unit.test_cli import run
from tests.unit.toy import train_values

PLUGIN = """\
import {module}
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moe_vision.experts import EXPERTS, Expert, ExpertConfig, ExpertSpec
from moe_vision.experts.base import HALF


@EXPERTS.register("{name}")
@dataclass(frozen=True, kw_only=True)
class MyConfig(ExpertConfig):
    specs: ClassVar[Mapping[str, ExpertSpec]] = {{
        "micro": ExpertSpec(
            hub_id=None, revision=None, licence="mit", channels=8, stride_px=16, image_size=(64, 64), mean=HALF,
            std=HALF, pretraining="none",
        )
    }}

    def build(self) -> "MyExpert":
        return MyExpert(self)


class MyExpert(Expert):
    def __init__(self, config: MyConfig) -> None:
        super().__init__(config)
        self.model = nn.Conv2d(3, 8, 16, stride=16)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels)
"""


class Hub:
    """Stands for huggingface_hub.HfApi: remembers what it was asked."""

    def __init__(self, fault: OSError | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fault = fault

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repository: str, **options: Any) -> None:
        self.asked.append((repository, options))

    def upload_folder(self, **options: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.asked.append((options.pop("repo_id"), {**options, "files": files}))
        return SimpleNamespace(repo_url="https://huggingface.co/me/model")


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """No self-test: other files test that."""
    monkeypatch.setattr(hf, "run_selftest", lambda *_: {"max_difference": 0.0, "new_tokens": 4})


@pytest.mark.usefixtures("proven")
def test_push_uploads_the_whole_folder_once(tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(hf, "HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "a token")
    report = export(tiny.source, tmp_path / "folder", push="me/model", private=True)
    assert report.url == "https://huggingface.co/me/model" and "pushed to https" in report.summary()
    (made, options), (repository, uploaded) = hub.asked
    assert made == repository == "me/model" and options == {"private": True, "exist_ok": True}
    assert uploaded["files"] == sorted(report.files) and uploaded["delete_patterns"] == ["*"]


def test_overwriting_takes_only_what_an_export_wrote(tiny: Exported, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src" / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match=r"is no export, it holds \['src'\]"):
        export(tiny.source, project, overwrite=True)
    clone = shutil.copytree(tiny.folder, tmp_path / "clone")
    (clone / ".git").mkdir()
    with pytest.raises(ExportError, match=r"is no export, it holds \['.git'\]"):
        export(tiny.source, clone, overwrite=True)
    with pytest.raises(ExportError, match="lies in the source"):
        export(tiny.source, tiny.source / "export")
    (tmp_path / "link").symlink_to(tiny.folder)
    with pytest.raises(ExportError, match="is a link: give"):
        export(tiny.source, tmp_path / "link", overwrite=True)
    assert (project / "src" / "thesis.txt").read_text() == "precious" and not (tiny.source / "export").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_shard_size": size}, f"max_shard_size '{size}' is no size")
        for size in ("-5GB", "0GB", "banana", "5", ".GB")
    ]
    + [({"private": True}, "private is of the repository")],
)
def test_options_that_say_nothing_are_refused(
    tiny: Exported, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        export(tiny.source, tmp_path / "folder", **options)


def test_a_card_holds_every_number(tiny: Exported) -> None:
    metrics = {"a": np.float32(1 / 3), "b": {"c": "x|y", "e": None}, "n": np.int64(12345)}
    assert list(leaves(metrics)) == [("a", "0.3333"), ("b.c", "x|y"), ("b.e", "None"), ("n", "12345")]
    assert r"| b.c | x\|y |" in results_table(metrics)


def test_an_export_names_no_folder_of_this_machine(micro: Exported) -> None:
    for file in micro.folder.iterdir():
        if file.suffix != ".safetensors":
            assert "/language_model" not in file.read_text(), file


def test_a_folder_with_a_pickle_is_refused(tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MoeVisionProcessor.save_pretrained

    def with_pickle(self: MoeVisionProcessor, folder: Path, *args: Any, **kwargs: Any) -> Any:
        (Path(folder) / "tokens.pkl").write_bytes(pickle.dumps("anything"))
        return plain(self, folder, *args, **kwargs)

    monkeypatch.setattr(MoeVisionProcessor, "save_pretrained", with_pickle)
    with pytest.raises(ExportError, match=r"would hold pickles, \['tokens.pkl'\]"):
        export(tiny.source, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("proven")
def test_a_push_that_fails_leaves_the_folder(tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "HfApi", Hub(OSError("no route to the Hub")))
    monkeypatch.setenv("HF_TOKEN", "a token")
    with pytest.raises(ExportError, match=r"no route to the Hub.*`hf upload me/model "):
        export(tiny.source, tmp_path / "folder", push="me/model")
    assert (tmp_path / "folder" / "model.safetensors").is_file()


def test_a_push_that_cannot_work_is_refused_before_any_work(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "get_token", lambda: None)
    with pytest.raises(ExportError, match="needs a token of the Hub"):
        export(tiny.source, tmp_path / "folder", push="me/model")
    with pytest.raises(ValueError, match="me//model"):
        export(tiny.source, tmp_path / "folder", push="me//model")
    assert not (tmp_path / "folder").exists()


@pytest.mark.usefixtures("proven")
def test_the_card_tells_of_training_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    values = train_values(tmp_path)
    train(TrainConfig.model_validate(values), tmp_path / "run", console=Console(quiet=True))
    (tmp_path / "results.json").write_text(json.dumps({"average": 0.5, "by_task": {"dark": 0.25}}))
    code, _, err = run(
        monkeypatch, capsys, "export", tmp_path / "run", "-o", tmp_path / "out", "--metrics", tmp_path / "results.json"
    )
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "image-text-to-text" and header["library_name"] == "transformers"
    rows = [line for line in card.splitlines() if line.startswith("| projector |") or line.startswith("| finetune |")]
    first, second = values["stages"]
    rates = [", ".join(f"{group} {rate:g}" for group, rate in stage["train"].items()) for stage in (first, second)]
    assert rows == [
        f"| projector | {rates[0]} | `data.json` | 8 | 4 steps | 2 |",
        f"| finetune | {rates[1]} | `data.json` | 8 | 4 steps | 2 |",
    ]
    assert "| average | 0.5 |" in card and "| by_task.dark | 0.25 |" in card
    assert "random weights" in card and "context of 256 tokens" in card and "## Limits" in card
    assert str(tmp_path) not in card


def test_the_card_names_sources_without_the_folders_of_a_machine(tmp_path: Path) -> None:
    train(TrainConfig.model_validate(train_values(tmp_path)), tmp_path / "run", console=Console(quiet=True))
    file = tmp_path / "run" / "config.yaml"
    schedule = yaml.safe_load(file.read_text())
    schedule["model"]["language_model"]["pretrained"] = "/home/somebody/models/a-llama"
    schedule["stages"][0]["data"] |= {"path": None, "dataset": "somebody/pictures"}
    schedule["stages"][1]["data"] |= {"path": "~/data/questions.json"}
    file.write_text(yaml.safe_dump(schedule))
    told = training_of(tmp_path / "run")
    assert told is not None and told.startswith("Language model before training: `a-llama`.")
    assert "| `somebody/pictures` |" in told and "| `questions.json` |" in told


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[1]", "holds a JSON list")])
def test_metrics_that_are_none_are_refused_before_any_work(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, said: str
) -> None:
    (tmp_path / "results.json").write_text(text)
    code, _, err = run(
        monkeypatch, capsys, "export", tiny.source, "-o", tmp_path / "out", "--metrics", tmp_path / "results.json"
    )
    assert code == 2 and "results.json" in err and said in err and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("proven")
def test_a_folder_without_a_schedule_says_so(tiny: Exported, tmp_path: Path) -> None:
    export(tiny.source, tmp_path / "folder")
    assert "does not say how it was trained" in (tmp_path / "folder" / "README.md").read_text()


def test_verify_on_the_command_line(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, out, _ = run(monkeypatch, capsys, "verify", tiny.folder, "--json")
    assert code == 0 and json.loads(out)["max_difference"] == 0
    code, out, err = run(monkeypatch, capsys, "verify", tiny.source.parent)  # as a run's output holds its model
    assert code == 0 and "loads without moe_vision" in out, err
    broken = shutil.copytree(tiny.folder, tmp_path / "broken")
    code_file = broken / "modeling_moe_vision.py"
    code_file.write_text(code_file.read_text().replace("self.lm_head(", "2 * self.lm_head("))
    code, _, err = run(monkeypatch, capsys, "verify", broken)
    assert code == 2 and "logits differ by up to" in err


def with_plugin(module: str, folder: Path) -> str:
    """A saved model whose expert is a plug-in that imports a module, in folder/model. Returns the plug-in's name."""
    name = f"export_plugin_{module}"
    (folder / f"{name}.py").write_text(PLUGIN.format(module=module, name=name))
    import_plugin(folder / f"{name}.py")
    save(*tiny_model({"mine": {"type": name, "variant": "micro", "pretrained": None}}), folder / "model")
    return name


def test_a_plugin_goes_along(tmp_path: Path) -> None:
    name = with_plugin("math", tmp_path)
    report = export(tmp_path / "model", tmp_path / "folder")
    assert report.max_difference == 0
    assert f"# ---- plug-in {name}.py" in (tmp_path / "folder" / "modeling_moe_vision.py").read_text()


def test_a_plugin_with_dependencies_is_refused_by_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = with_plugin("yaml", tmp_path)  # saves: training with it must not end in an error
    assert f"plug-in {name}.py" in caplog.text
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    with pytest.raises(FlattenError, match=f"^plug-in {name}.py:1: `import yaml` imports 'yaml'"):
        export(tmp_path / "model", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
