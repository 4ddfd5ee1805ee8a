"""The command line: what a user types, and what a user sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_vision import cli
from tests.tiny import tiny_model, tiny_values

CONFIGS = Path(__file__).parents[2] / "configs"


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["moe-vision", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.command()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_show_prints_each_part_and_json(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny_values()))
    code, out, _ = run(monkeypatch, capsys, "show", tmp_path / "model.yaml")
    assert code == 0 and "experts.clip" in out and "4 visual tokens" in out
    code, out, _ = run(monkeypatch, capsys, "show", tmp_path / "model.yaml", "experts.sam=null", "--json")
    assert code == 0 and list(json.loads(out)["config"]["experts"]) == ["clip"]


def test_show_of_a_train_config(monkeypatch, capsys) -> None:
    code, out, _ = run(monkeypatch, capsys, "show", CONFIGS / "train/micro.yaml")
    assert code == 0 and "01-projector" in out and "adapters" in out


def test_errors_have_no_traceback_and_exit_2(monkeypatch, capsys, tmp_path: Path) -> None:
    code, out, err = run(monkeypatch, capsys, "show", CONFIGS / "model/micro.yaml", "experts.clip.layr=-2")
    assert code == 2 and out == ""
    assert "experts.clip.layr" in err and "did you mean 'layer'" in err and "Traceback" not in err
    code, _, err = run(monkeypatch, capsys, "show", tmp_path / "nothing.yaml")
    assert code == 2 and "no such file" in err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_vision", "--debug", "show", str(tmp_path / "nothing.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "Traceback" in result.stderr


def test_generate_answers_about_a_picture_by_path(monkeypatch, capsys, folder: Path, scenes: dict[str, Path]) -> None:
    image = scenes["test"].parent / "images/test/00000.png"
    code, out, _ = run(
        monkeypatch, capsys, "generate", folder, "read label", "--image", image, "--max-new-tokens", 3, "--json"
    )
    assert code == 0 and json.loads(out)["question"] == "read label"
    code, _, err = run(monkeypatch, capsys, "generate", folder, "read label", "--image", "no.png")
    assert code == 2 and "image 'no.png': no such file" in err


def test_generate_needs_a_model_folder(monkeypatch, capsys, tmp_path: Path) -> None:
    code, _, err = run(monkeypatch, capsys, "generate", tmp_path, "read label")
    assert code == 2 and "is no model folder" in err


def test_eval_prints_scores(monkeypatch, capsys, folder: Path, scenes: dict[str, Path], tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    code, out, _ = run(monkeypatch, capsys, "eval", folder, scenes["test"], "--json", "--predictions", answers)
    report = json.loads(out)
    assert code == 0 and report["count"] == 48 and set(report["by_task"]) >= {"ocr", "area"}
    assert len(json.loads(answers.read_text())["predictions"]) == 48


def test_schema_is_json_schema(monkeypatch, capsys) -> None:
    for kind, key in (("model", "experts"), ("train", "stages")):
        code, out, _ = run(monkeypatch, capsys, "schema", kind)
        assert code == 0 and key in json.loads(out)["properties"]
    code, _, err = run(monkeypatch, capsys, "schema", "modle")
    assert code == 2 and "did you mean 'model'" in err


def test_micro_list(monkeypatch, capsys) -> None:
    code, out, _ = run(monkeypatch, capsys, "micro", "list", "--json")
    assert code == 0 and set(json.loads(out)) == {"clip", "convnext", "pix2struct", "eva02", "sam", "language_model"}
    code, _, err = run(monkeypatch, capsys, "micro", "rebuild", "--expert", "clop")
    assert code == 2 and "did you mean 'clip'" in err


def test_export_that_exists(monkeypatch, capsys, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    code, _, err = run(monkeypatch, capsys, "export", folder, "-o", tmp_path / "out")
    assert code == 2 and "is not empty: choose another folder" in err


def test_plugin_option_registers_what_a_folder_needs(monkeypatch, capsys, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from moe_vision.experts import EXPERTS, ClipConfig\n\n\n"
        "@EXPERTS.register('cli_test_plugin')\n@dataclass(frozen=True, kw_only=True)\n"
        "class MyClip(ClipConfig):\n    pass\n"
    )
    values = tiny_values()
    values["experts"]["mine"] = {"type": "cli_test_plugin", "variant": "micro", "pretrained": None}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run(monkeypatch, capsys, "show", tmp_path / "model.yaml")
    assert code == 2 and "unknown type 'cli_test_plugin'" in err
    code, out, err = run(monkeypatch, capsys, "--plugin", plugin, "show", tmp_path / "model.yaml")
    assert code == 0 and "experts.mine" in out, err
    code, _, err = run(monkeypatch, capsys, "--plugin", tmp_path / "no.py", "show", tmp_path / "model.yaml")
    assert code == 2 and "no such file" in err


def test_show_lists_the_zoo(monkeypatch, capsys) -> None:
    code, out, _ = run(monkeypatch, capsys, "show", "--experts", "--json")
    entries = {(entry["expert"], entry["variant"]): entry for entry in json.loads(out)}
    assert code == 0
    eva02 = entries["eva02", "large_coco_det"]
    assert (eva02["tokens"], eva02["channels"], eva02["stride_px"], eva02["licence"]) == (4096, 1024, 16, "mit")
    assert eva02["parameters"] == pytest.approx(303.4e6, rel=0.01) and eva02["flops"] == pytest.approx(
        3.10e12, rel=0.01
    )
    assert entries["clip", "vit_large_patch14_336"]["weights"] == "openai/clip-vit-large-patch14-336"
    assert {"siglip", "dinov3", "radio", "timm"} <= {expert for expert, _ in entries}
    code, _, err = run(monkeypatch, capsys, "show", CONFIGS / "model/micro.yaml", "--experts")
    assert code == 2 and "takes no config" in err
    code, _, err = run(monkeypatch, capsys, "show")
    assert code == 2 and "show needs a config, or --experts" in err


@pytest.mark.parametrize("name", ["eagle-x4", "eagle-x5", "eagle-x5-released"])
def test_every_eagle_preset_shows_offline(monkeypatch, capsys, name: str) -> None:
    code, out, _ = run(monkeypatch, capsys, "show", CONFIGS / f"model/{name}.yaml", "--json")
    cost = json.loads(out)["cost"]
    channels = {part["part"]: part["channels"] for part in cost["parts"]}
    assert code == 0 and cost["visual_tokens"] == 1024
    assert channels["mixers.overview"] == (6656 if name == "eagle-x4" else 7680)


def test_import_of_what_is_no_eagle_folder(monkeypatch, capsys, tmp_path: Path) -> None:
    code, _, err = run(monkeypatch, capsys, "import", "eagle", tmp_path, "-o", tmp_path / "out")
    assert code == 2 and "has no config.json: give the folder of an Eagle checkpoint" in err.replace("\n", " ")
