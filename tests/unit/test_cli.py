"""The command line: what a user types, and what a user sees."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from moe_vision import cli
from moe_vision.recipes.experts import RECIPES
from moe_vision.viz.tables import COMPARED
from tests.tiny import tiny_model, tiny_values
from tests.unit.toy import train_values
from tests.unit.toy_search import search_values

CONFIGS = Path(__file__).parents[2] / "configs"


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, columns: int = 200
) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["moe-vision", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", str(columns))
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


def test_show_of_a_schedule_reads_in_80_columns(monkeypatch, capsys) -> None:
    _, out, _ = run(monkeypatch, capsys, "show", CONFIGS / "train/micro-alternate.yaml", columns=80)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    second = lines[lines.index("02-alternate questions of 1000 scenes, train, 1,000 records") :]
    assert second[2:5] == [
        "trains adapters 186.34 k at 0.001", "language_model 374.50 k at 0.0003",
        "in turn adapters 10 steps, language_model 10 steps",
    ]  # fmt: skip
    assert second[1].startswith("work 126 steps of 16, ") and second[5].startswith("frozen experts.clip 200.38 k, ")


def test_show_of_a_comparison(monkeypatch, capsys) -> None:
    code, out, _ = run(monkeypatch, capsys, "show", CONFIGS / "compare/micro.yaml")
    assert code == 0 and "02-questions" in out and "questions of 1000 scenes, train" in out
    code, out, _ = run(monkeypatch, capsys, "show", CONFIGS / "compare/micro.yaml", "--json")
    assert code == 0 and json.loads(out)["config"]["mixers"]["deformable"]["mixer"] == {"base": "eva02"}


def test_compare_prints_one_table_or_only_json(monkeypatch, capsys, tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=1)
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    data = values["stages"][0]["data"]["path"]
    arguments = ["compare", tmp_path / "compare.yaml", "--seeds", 1, "--output", tmp_path / "out", "--test", data]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "--mixer = None: names no mixer" in err
    code, out, err = run(monkeypatch, capsys, *arguments, "--mixer", "channel_concat", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "out" / "results.json").read_text())
    assert "1 of 1: channel_concat, seed 3" in err
    code, out, _ = run(monkeypatch, capsys, *arguments, "--mixer", "channel_concat")
    assert code == 0 and "is finished" in out and "report.md" in out
    lines = out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "exact match" in line) : -1]
    assert all(len(line.rstrip()) <= 80 for line in table)
    rule = next(i for i, line in enumerate(table) if "───" in line)
    assert set(" ".join(table[:rule]).split()) >= set(" ".join(COMPARED).split())
    row = next(line for line in table if line.split()[:1] == ["channel_concat"])
    accuracy = json.loads((tmp_path / "out" / "results.json").read_text())["mixers"]["channel_concat"]["accuracy"]
    assert row.split()[1:3] == [f"{accuracy['mean']:.3f}", "4"]


def test_search_prints_what_is_best_or_only_json(monkeypatch, capsys, tmp_path: Path) -> None:
    values = search_values(tmp_path, pool=["clip"], seeds=1)
    asked = {name: values.pop(name)["path"] for name in ("validation", "test")}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    arguments = ["search", tmp_path / "search.yaml", "--output", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "validation = None: is missing; give --validation FILE" in err and "test = None" in err
    arguments += ["--validation", asked["validation"], "--test", asked["test"]]
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "out" / "results.json").read_text())
    assert "train clip (random), seed 0: 0." in err
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert (
        code == 0 and "best: clip (random), 0." in out and "best.yaml --output run" in out and "train clip" not in out
    )
    assert "- Baselines on the test split: blind 0." in out and "**" not in out
    code, out, _ = run(monkeypatch, capsys, "show", tmp_path / "search.yaml")
    assert code == 0 and "greedy search over clip (random): at most 1 sets to train, 1 seeds each" in " ".join(
        out.split()
    )
    code, out, _ = run(monkeypatch, capsys, "schema", "search")
    assert code == 0 and "task_weights" in json.loads(out)["properties"]


def test_train_keeps_features_for_other_runs(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train_values(tmp_path, max_steps=1)))
    found = []
    for output in ("one", "two"):
        arguments = ["train", tmp_path / "train.yaml", "-o", tmp_path / output, "--features", tmp_path / "features"]
        code, _, _ = run(monkeypatch, capsys, *arguments)
        assert code == 0
        found.append({file: file.stat().st_mtime_ns for file in (tmp_path / "features").glob("*/*.safetensors")})
    assert len(found[0]) == 2 and found[0] == found[1]  # read, and not made again


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
    for kind, key in (("model", "experts"), ("train", "stages"), ("compare", "mixers")):
        code, out, _ = run(monkeypatch, capsys, "schema", kind)
        assert code == 0 and key in json.loads(out)["properties"]
    code, _, err = run(monkeypatch, capsys, "schema", "modle")
    assert code == 2 and "did you mean 'model'" in err


def test_micro_list(monkeypatch, capsys) -> None:
    code, out, _ = run(monkeypatch, capsys, "micro", "list", "--json")
    assert code == 0 and set(json.loads(out)) == {*RECIPES, "language_model"}
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


def test_plan_prints_one_object_for_each_size(monkeypatch, capsys) -> None:
    sizes = ["672x1008", "1x1", "0x5"]
    code, out, _ = run(monkeypatch, capsys, "plan", *sizes, "--policy", "uhd", "--json")
    sliced, tiny, empty = json.loads(out)
    assert code == 0
    assert sliced == {
        "policy": "uhd", "size_hw": [672, 1008], "grid_rows_cols": [2, 3],
        "views": [{"role": "slice", "size_hw": [336, 336]}] * 6 + [{"role": "overview", "size_hw": [266, 406]}],
        "num_visual_tokens": 7 * 64, "num_marker_tokens": 6,
    }  # fmt: skip
    assert tiny["grid_rows_cols"] is None and tiny["views"] == [{"role": "overview", "size_hw": [336, 336]}]
    assert empty == {"size_hw": [0, 5], "error": "an image of 0x5 pixels has nothing to see"}


@pytest.mark.parametrize(
    ("policy", "settings", "views", "visual", "markers"),
    [
        ("uhd", ["max_slices=7", "tokens_per_view=144"], 7, 7 * 144, 6),
        ("tiles", [], 7, 7 * 256, 2),
        ("tiles", ["thumbnail=false", "tokens_per_tile=64"], 6, 6 * 64, 2),
        ("anyres", [], 7, 27 * 27 + 54 * 81, 54),
        ("native", [], 1, 24 * 36, 2),
        ("native", ["factor=32", "max_pixels=262144"], 1, 13 * 19, 2),
        ("slime", ["tokens_per_tile=100"], 7, 576 + 6 * 100, 1),
        ("none", [], 1, 576, 0),
    ],
)
def test_plan_by_policy_and_settings(
    monkeypatch, capsys, policy: str, settings: list[str], views: int, visual: int, markers: int
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    code, out, _ = run(monkeypatch, capsys, "plan", "672x1008", "--policy", policy, *flags, "--json")
    (found,) = json.loads(out)
    assert code == 0
    assert (len(found["views"]), found["num_visual_tokens"], found["num_marker_tokens"]) == (views, visual, markers)


def test_plan_as_a_table_of_pictures_and_videos(monkeypatch, capsys, tmp_path: Path) -> None:
    Image.new("RGB", (1008, 672)).save(tmp_path / "wide.png")
    code, out, _ = run(monkeypatch, capsys, "plan", tmp_path / "wide.png", "20000x50", "--policy", "native")
    assert code == 0 and "1 overview of 672x1008" in out and "longer than 200 times its breadth" in out
    code, out, _ = run(monkeypatch, capsys, "plan", "480x640", "--policy", "tiles", "--frames", 3)
    assert code == 0 and "3 slices of 448x448" in out
    code, out, _ = run(monkeypatch, capsys, "plan", "672x1008", "--policy", "tiles", "--images-per-prompt", 12)
    assert code == 0 and "1 slice of 448x448" in out


def test_plan_of_a_model_config_counts_its_own_tokens(monkeypatch, capsys) -> None:
    config = CONFIGS / "model/llava-uhd-144.yaml"
    code, out, _ = run(monkeypatch, capsys, "plan", "672x1008", "--config", config, "--json")
    assert code == 0 and json.loads(out)[0]["num_visual_tokens"] == 7 * 144
    arguments = ("plan", "672x1008", "--config", config, "--set", "max_slices=2", "--json")
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0 and json.loads(out)[0]["num_visual_tokens"] == 3 * 144


def test_plan_draws_what_the_model_sees(monkeypatch, capsys, tmp_path: Path) -> None:
    halves = Image.new("RGB", (320, 200), (10, 120, 30))
    halves.paste((230, 20, 200), (160, 0, 320, 200))
    halves.save(tmp_path / "halves.png")
    drawn = tmp_path / "plans.png"
    code, _, err = run(
        monkeypatch, capsys, "plan", tmp_path / "halves.png", "900x300", "--policy", "anyres", "--image", drawn
    )
    assert code == 0, err
    with Image.open(drawn) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    first = pixels[: height // 2]  # the row of the image; below is that of the bare size
    for colour in ((10, 120, 30), (230, 20, 200)):
        found = (np.abs(first.astype(int) - colour).max(-1) < 3).mean(0)
        assert found[: width * 2 // 5].sum() > 0.02 * width  # in the outlined image on the left
        assert found[width * 2 // 5 :].sum() > 0.02 * width  # in the views on the right
    below = pixels[height // 2 :].reshape(-1, 3)
    for shown in ((214, 39, 40), (31, 119, 180)):  # what stands for slices and for the overview without an image
        mixed = [round(255 - 0.25 * (255 - value)) for value in shown]
        assert (np.abs(below.astype(int) - mixed).max(-1) < 3).mean() > 0.005
    code, _, err = run(monkeypatch, capsys, "plan", "0x5", "--policy", "uhd", "--image", tmp_path / "none.png")
    assert code == 2 and "refused every image" in err
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["672x1008", "--policy", "uhdd"], "slicing policy 'uhdd': did you mean 'uhd'?"),
        (["672x1008", "--policy", "uhd", "--set", "max_slice=3"], "did you mean 'max_slices'?"),
        (["672x1008", "--policy", "uhd", "--set", "max_slices"], "write KEY=VALUE, as max_slices=9"),
        (["672x1008", "--policy", "uhd", "--set", "type=tiles"], "the policy is 'uhd'; choose another by its name"),
        (["672x1008", "--policy", "uhd", "--set", "max_slices=0"], "max_slices 0 of slicing 'uhd'"),
        (["672y1008", "--policy", "uhd"], "'672y1008' is neither a size (HEIGHTxWIDTH, as 672x1008) nor a picture"),
        (["672x1008"], "either --policy or --config"),
        (["672x1008", "--policy", "uhd", "--frames", "2", "--images-per-prompt", "2"], "give one of them"),
    ],
)
def test_plan_says_what_is_wrong(monkeypatch, capsys, arguments: list[str], said: str) -> None:
    code, out, err = run(monkeypatch, capsys, "plan", *arguments)
    assert code == 2 and out == "" and said in err


def test_show_counts_a_sliced_model_for_a_size(monkeypatch, capsys) -> None:
    config = CONFIGS / "model/llava-uhd.yaml"
    tokens = {}
    for size in ("336x336", "672x1008"):
        code, out, _ = run(monkeypatch, capsys, "show", config, "--size", size, "--json")
        assert code == 0
        tokens[size] = json.loads(out)["cost"]["visual_tokens"]
    assert tokens == {"336x336": 64, "672x1008": 7 * 64 + 6}
    code, _, err = run(monkeypatch, capsys, "show", config, "--size", "big")
    assert code == 2 and "size 'big': write HEIGHTxWIDTH" in err
