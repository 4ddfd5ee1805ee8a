"""Relative paths start at the file that holds them, through bases, models and overrides; plug-ins need consent."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_vision import plugins
from moe_vision.comparison import CompareConfig
from moe_vision.config import ConfigError, import_plugin, load_config
from moe_vision.experts import EXPERTS
from moe_vision.modeling.compose import compose, save
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.search.config import SearchConfig
from moe_vision.training.loading import load_schedule
from moe_vision.training.schedule import TrainConfig
from tests.tiny import tiny_model, tiny_values
from tests.unit.test_cli import run
from tests.unit.toy import model_values

CASE = Path(__file__).parents[1] / "cases/plugin_of_base"


def write(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_plugin_of_a_base_is_the_one_beside_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    load_config(ModelConfig, CASE / "B/child.yaml")
    assert capsys.readouterr().out == "A plugin\n"


def model_in(folder: Path, **language: Any) -> dict[str, Any]:
    """A model config whose paths exist below `folder`."""
    for name in ("weights", "tokenizer", "language"):
        (folder / name).mkdir(parents=True)
    (folder / "mine.jinja").write_text("{{ messages }}")
    values = tiny_values(("clip", "sam"))
    values["experts"]["clip"]["pretrained"] = "./not-there.safetensors"
    values["experts"]["sam"]["pretrained"] = "weights"
    values["language_model"] |= {
        "pretrained": "language", "tokenizer": "../here/tokenizer", "chat_template": "mine.jinja", **language,
    }  # fmt: skip
    return values


def check_model(config: ModelConfig, folder: Path) -> None:
    assert config.experts["clip"].pretrained == str(folder / "not-there.safetensors")
    assert config.experts["sam"].pretrained == str(folder / "weights")
    language = config.language_model
    assert language.pretrained == str(folder / "language") and language.tokenizer == str(folder / "tokenizer")
    assert language.chat_template == str(folder / "mine.jinja")


def test_paths_of_a_base_start_at_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "here/base.yaml", model_in(tmp_path / "here"))
    child = write(tmp_path / "there/child.yaml", {"base": "../here/base.yaml"})
    check_model(load_config(ModelConfig, child), tmp_path / "here")
    (tmp_path / "there/own").mkdir()
    write(child, {"base": "../here/base.yaml", "experts": {"sam": {"pretrained": "own"}}})
    assert load_config(ModelConfig, child).experts["sam"].pretrained == str(tmp_path / "there/own")
    (tmp_path / "elsewhere/own").mkdir()
    found = load_config(ModelConfig, child, ["experts.sam.pretrained=own"]).experts["sam"].pretrained
    assert found == str(tmp_path / "elsewhere/own")  # of an override, at the working folder


def test_names_stay_names(tmp_path: Path) -> None:
    values = model_in(tmp_path / "here", pretrained="org/name", tokenizer="moe_vision:micro/language_model")
    values["language_model"]["chat_template"] = "vicuna_v1"
    values["experts"]["clip"]["pretrained"] = "timm:vit_tiny"
    (tmp_path / "here/vicuna_v1").mkdir()  # a folder is no template
    config = load_config(ModelConfig, write(tmp_path / "here/m.yaml", values))
    assert config.language_model.pretrained == "org/name" and config.language_model.chat_template == "vicuna_v1"
    assert config.language_model.tokenizer == "moe_vision:micro/language_model"
    assert config.experts["clip"].pretrained == "timm:vit_tiny"


@pytest.mark.parametrize("kind", [TrainConfig, CompareConfig, SearchConfig])
def test_paths_of_schedules_and_of_their_models(tmp_path: Path, kind: type[TrainConfig]) -> None:
    write(tmp_path / "here/model.yaml", model_in(tmp_path / "here"))
    (tmp_path / "base/table").mkdir(parents=True)
    parts = [{"path": "a.json", "image_root": "images"}, {"dataset": "table", "columns": {"conversations": "c"}},
             {"dataset": "org/name", "columns": {"conversations": "c"}}]  # fmt: skip
    stage = {"name": "one", "train": {"adapters": 1e-3}, "epochs": 1, "data": {"mixture": parts}}
    values: dict[str, Any] = {"model": "../here/model.yaml", "stages": [stage]}
    if kind is not TrainConfig:
        values["test"] = {"path": "../test.json"}
    write(tmp_path / "base/train.yaml", values)
    config = load_schedule(kind, write(tmp_path / "child/train.yaml", {"base": "../base/train.yaml", "seed": 3}))
    assert isinstance(config.model, dict) and config.seed == 3
    check_model(ModelConfig.model_validate(config.model), tmp_path / "here")
    assert config.stages[0].data is not None
    first, second, third = config.stages[0].data.parts
    assert first.path == str(tmp_path / "base/a.json") and first.image_root == str(tmp_path / "base/images")
    assert second.dataset == str(tmp_path / "base/table") and third.dataset == "org/name"
    if kind is not TrainConfig:
        assert config.model_dump()["test"]["path"] == str(tmp_path / "test.json")


def test_a_model_that_a_schedule_holds_starts_at_the_schedule(tmp_path: Path) -> None:
    stage = {"name": "one", "train": {"adapters": 1e-3}, "epochs": 1, "data": {"path": "a.json"}}
    write(tmp_path / "here/train.yaml", {"model": model_in(tmp_path / "here"), "stages": [stage]})
    config = load_schedule(TrainConfig, tmp_path / "here/train.yaml")
    check_model(ModelConfig.model_validate(config.model), tmp_path / "here")


@pytest.mark.parametrize("key", ["pretrained", "tokenizer", "chat_template"])
def test_a_path_that_is_missing_is_no_hub_id(tmp_path: Path, key: str) -> None:
    values = model_values(tmp_path)
    values["language_model"][key] = "./not/there"
    config = load_config(ModelConfig, write(tmp_path / "model.yaml", values))
    with pytest.raises(ValueError, match=f"language_model.{key} '{tmp_path}/not/there': no such file or folder"):
        compose(config)


def plugin_config(config: Path, plugin: str) -> Path:
    return write(config, {**tiny_values(), "plugins": [plugin]})


MARK = "import pathlib\npathlib.Path({!r}).touch()\n"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the plug-in of the test makes when it runs."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "ran"


@pytest.mark.parametrize("way", ["up", "absolute", "link", "home"])
def test_a_plugin_outside_the_folder_of_its_config_needs_consent(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    code = tmp_path / "outside" / f"{way}.py"
    code.parent.mkdir()
    code.write_text(MARK.format(str(ran)))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/link.py").symlink_to(code)
    name = {"up": f"../outside/{way}.py", "absolute": str(code), "link": "link.py", "home": f"~/outside/{way}.py"}[way]
    config = plugin_config(tmp_path / "inside/model.yaml", name)
    with pytest.raises(
        ConfigError, match=r"model.yaml.*\n  plugins.0 = .* is outside the config's folder.*--allow-plugins"
    ):
        load_config(ModelConfig, config)
    assert not ran.exists()
    found = load_config(ModelConfig, config, allow_plugins=True)
    assert ran.exists() and found.plugins == [str(code)]


@pytest.mark.parametrize("line", ["{code}", "{code.parent}"])
def test_the_trust_file_is_consent(tmp_path: Path, ran: Path, line: str) -> None:
    code = tmp_path / f"outside/trusted{len(line)}.py"
    code.parent.mkdir()
    code.write_text(MARK.format(str(ran)))
    plugins.trust_file().parent.mkdir(parents=True)
    plugins.trust_file().write_text(f"# mine\n\n{line.format(code=code)}\n")
    load_config(ModelConfig, plugin_config(tmp_path / "inside/model.yaml", str(code)))
    assert ran.exists()


def test_a_plugin_below_its_config_runs(tmp_path: Path, ran: Path) -> None:
    (tmp_path / "inside/code").mkdir(parents=True)
    (tmp_path / "inside/code/below.py").write_text(MARK.format(str(ran)))
    load_config(ModelConfig, plugin_config(tmp_path / "inside/model.yaml", "code/below.py"))
    assert ran.exists()


@pytest.mark.parametrize("value", [3, "mine.py", [3], {"a": "b"}, [None], [["a.py"]], [""]])
def test_plugins_of_a_wrong_type_are_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="plugins"):
        load_config(ModelConfig, write(tmp_path / "model.yaml", {**tiny_values(), "plugins": value}))


MODEL_PLUGIN = """
from dataclasses import dataclass
from moe_vision.experts import EXPERTS, ClipConfig

@EXPERTS.register("{name}")
@dataclass(frozen=True, kw_only=True)
class MyClip(ClipConfig):
    pass
"""


@pytest.mark.parametrize("command", ["verify", "generate", "eval", "export"])
def test_commands_on_a_model_find_its_plugins_or_name_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    name = f"plugin_of_a_run_{command}"
    plugin = tmp_path / "code" / f"{name}.py"
    plugin.parent.mkdir()
    plugin.write_text(MODEL_PLUGIN.format(name=name))
    import_plugin(plugin)
    model, processor = tiny_model({"mine": {"type": name, "variant": "micro", "pretrained": None}})
    save(model, processor, tmp_path / "run/model")
    write(tmp_path / "run/config.yaml", {"model": {"plugins": [str(plugin)]}, "stages": []})
    del EXPERTS._classes[name]  # as in a new process
    for module in [key for key in sys.modules if name in key]:
        del sys.modules[module]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "1", "conversations": [{"from": "human", "value": "read label"},
                                                              {"from": "gpt", "value": "1"}]}]))  # fmt: skip
    last = {"verify": [], "generate": ["read label"], "eval": [data], "export": ["-o", tmp_path / "out"]}[command]
    (tmp_path / "alone").symlink_to(tmp_path / "run/model")
    code, _, err = run(monkeypatch, capsys, command, tmp_path / "alone", *last)
    assert code == 2 and f"unknown expert '{name}'" in err and "`moe-vision --plugin FILE …`" in err
    code, _, err = run(monkeypatch, capsys, command, tmp_path / "run", *last)
    assert code == 2 and "run/config.yaml" in err and "--allow-plugins" in err and name not in EXPERTS
    if command in ("generate", "eval"):  # the others load it in a second process: tests/export/test_release.py
        code, _, err = run(monkeypatch, capsys, "--allow-plugins", command, tmp_path / "run/model", *last)
        assert code == 0 and name in EXPERTS, err
    plugin.rename(tmp_path / "moved.py")
    for module in [key for key in sys.modules if name in key]:
        del sys.modules[module]
    code, _, err = run(monkeypatch, capsys, "--allow-plugins", command, tmp_path / "run", *last)
    assert code == 2 and "no such file" in err and "--plugin FILE" in err
