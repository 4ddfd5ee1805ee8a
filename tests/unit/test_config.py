"""Config files: merging, overriding, and every way of being wrong."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe_vision.config import ConfigError, apply_override, load_config, merge, read_yaml, validate
from moe_vision.experts import EXPERTS
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from moe_vision.search.config import SearchConfig
from moe_vision.search.subsets import pool_of
from moe_vision.training.loading import load_schedule, model_config
from moe_vision.training.schedule import TrainConfig
from tests.tiny import tiny_values

CONFIGS = Path(__file__).parents[2] / "configs"


def problems(values: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(ModelConfig, values, source="test")
    return [str(problem) for problem in caught.value.problems]


def test_every_model_preset_validates_and_round_trips() -> None:
    paths = sorted(CONFIGS.glob("model/*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        config = load_config(ModelConfig, path)
        assert validate(ModelConfig, config.to_plain(), source="again") == config


def test_every_train_preset_validates() -> None:
    paths = sorted(CONFIGS.glob("train/*.yaml"))
    assert paths
    for path in paths:
        assert load_config(TrainConfig, path).stages


def test_every_search_preset_validates_and_its_base_is_in_the_pool() -> None:
    found = {path.stem: load_schedule(SearchConfig, path) for path in CONFIGS.glob("search/*.yaml")}
    assert found["eagle"].base_experts == ["clip", "convnext"]
    for config in found.values():
        assert {*config.base_experts} <= {*pool_of(config, model_config(config))}


def test_a_base_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("base: [clip, convnext]")
    with pytest.raises(ConfigError, match="base = \\['clip', 'convnext'\\]: is no file's name; give one YAML file"):
        read_yaml(tmp_path / "search.yaml")


def test_misspelt_key_at_three_depths_comes_at_once_with_the_nearest_names() -> None:
    values = tiny_values(slicin={"type": "none"})
    values["branches"]["overview"]["mixer"]["gird"] = [4, 4]
    values["experts"]["clip"]["layr"] = -2
    found = problems(values)
    assert len(found) == 3
    text = "\n".join(found)
    assert "slicin = {'type': 'none'}: unknown key 'slicin'; did you mean 'slicing'?" in text
    assert "branches.overview.mixer.gird = [4, 4]: unknown key 'gird'; did you mean 'grid'?" in text
    assert "experts.clip.layr = -2: unknown key 'layr'; did you mean 'layer'?" in text


def test_unknown_type() -> None:
    values = tiny_values()
    values["branches"]["overview"]["adapter"]["type"] = "mpl"
    assert problems(values) == [
        "branches.overview.adapter.type = 'mpl': unknown type 'mpl'; did you mean 'mlp'? (known: cell, "
        "gated_mixture, mlp, perceiver, "
        "query_compressor, region_attention)"
    ]


def test_unknown_variant() -> None:
    values = tiny_values()
    values["experts"]["clip"]["variant"] = "mikro"
    (problem,) = problems(values)
    assert "unknown variant 'mikro' of clip; did you mean 'micro'?" in problem


def test_wrong_unit() -> None:
    values = tiny_values()
    values["experts"]["clip"]["image_size"] = "64px"
    (problem,) = problems(values)
    assert "experts.clip.image_size = '64px'" in problem and "[height, width]" in problem


def test_expert_unknown_in_an_override() -> None:
    with pytest.raises(ConfigError, match=r"experts.clpi = 'clpi': no such expert.*did you mean 'clip'"):
        load_config(ModelConfig, CONFIGS / "model/micro.yaml", ["experts.clpi.layer=-2"])


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"mirco.yaml.*no such file; did you mean 'micro.yaml'"):
        load_config(ModelConfig, CONFIGS / "model/mirco.yaml")


def test_plugin_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import not_a_module")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"plugins": ["mine.py"], **tiny_values()}))
    with pytest.raises(
        ConfigError, match=r"mine.py.*does not import: ModuleNotFoundError.*not_a_module.*mend the file"
    ):
        load_config(ModelConfig, tmp_path / "model.yaml")


PLUGIN = """
from dataclasses import dataclass
from moe_vision.experts import ClipConfig, EXPERTS

@EXPERTS.register("{name}")
@dataclass(frozen=True, kw_only=True)
class MyClip(ClipConfig):
    strength: float = 1.0
"""


def test_plugin_registers_an_expert(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(name="config_test_plugin"))
    values = tiny_values()
    values["experts"]["mine"] = {"type": "config_test_plugin", "variant": "micro", "pretrained": None, "strength": 2}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"plugins": ["mine.py"], **values}))
    config = load_config(ModelConfig, tmp_path / "model.yaml")
    assert config.experts["mine"].strength == 2.0
    assert "config_test_plugin" in EXPERTS


def test_base_merges_below_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_values()))
    (tmp_path / "top.yaml").write_text("base: base.yaml\nbranches: {overview: {adapter: {depth: 3}}}\n")
    config = load_config(ModelConfig, tmp_path / "top.yaml", ["branches.overview.adapter.pool=1", "experts.sam=null"])
    assert config.branches.overview.adapter.depth == 3 and config.branches.overview.adapter.pool == 1
    assert list(config.experts) == ["clip"]


def test_an_expert_that_is_null_above_is_taken_out_of_the_base(tmp_path: Path) -> None:
    values = tiny_values(("clip", "sam", "convnext"))
    values["branches"]["overview"]["mixer"]["resample"] = {"sam": "pool", "convnext": "pool"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    top = tmp_path / "top.yaml"
    top.write_text("base: base.yaml\nexperts: {sam: null, clip: {layer: -2}}\n")
    config = load_config(ModelConfig, top)
    assert list(config.experts) == ["clip", "convnext"]
    assert config.branches.overview.mixer.to_dict()["resample"] == {"convnext": "pool"}
    top.write_text("base: base.yaml\nexperts: {sma: null}\n")
    with pytest.raises(ConfigError, match=r"experts\.sma.*no such expert in this config; did you mean 'sam'"):
        load_config(ModelConfig, top)
    top.write_text("base: base.yaml\nexperts: [sam]\n")
    with pytest.raises(ConfigError, match="experts"):
        load_config(ModelConfig, top)


def test_base_that_includes_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(ModelConfig, tmp_path / "a.yaml")


def test_pool_that_does_not_divide() -> None:
    values = tiny_values()
    values["branches"]["overview"]["adapter"]["pool"] = 3
    (problem,) = problems(values)
    assert "pool 3 of mlp does not divide the grid [4, 4]" in problem and "[1, 2, 4]" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_ratio": 500}, "warmup_ratio 500.0 is no share"),
        ({"train": {"adapters": 100}}, "learning rate 100.0 of 'adapters' is out of range"),
        ({"max_steps": 3}, "epochs and max_steps"),
        ({"epochs": "three days"}, "epochs"),
    ],
)
def test_train_config_units(change: dict, message: str) -> None:
    stage = {"name": "one", "train": {"adapters": 1e-3}, "data": {"path": "x.json"}, "epochs": 1} | change
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig, {"model": "m.yaml", "stages": [stage]}, source="test")


keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(st.integers(), lambda below: st.dictionaries(keys, below, max_size=3), max_leaves=8)
mappings = st.dictionaries(keys, trees, max_size=4)


@given(mappings, mappings)
def test_merge_keeps_both_and_the_upper_wins(below: dict, above: dict) -> None:
    merged = merge(below, above)
    assert set(merged) == set(below) | set(above)
    assert merge(merged, above) == merged
    assert merge(below, {}) == below


@given(mappings, st.lists(keys, min_size=1, max_size=3), st.integers())
def test_an_override_sets_exactly_its_key(values: dict, path: list[str], number: int) -> None:
    try:
        result = apply_override(values, f"{'.'.join(path)}={number}")
    except ConfigError as error:
        assert "is a value, not a mapping" in str(error)
        return
    node = result
    for key in path:
        node = node[key]
    assert node == number
    assert {k: v for k, v in result.items() if k != path[0]} == {k: v for k, v in values.items() if k != path[0]}


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-5\nb: -2E3\nc: 1.5e+2\nd: e5\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1e-5, "b": -2000.0, "c": 150.0, "d": "e5"}


def test_architecture_values_of_a_wrong_type_are_named() -> None:
    values = tiny_values()
    values["experts"]["clip"]["architecture"] = {"hidden_size": "wide"}
    with pytest.raises(ConfigError, match=r"experts\.clip.*architecture of clip 'micro' is refused.*hidden_size"):
        validate(ModelConfig, values, source="test")


def test_taking_an_expert_out_takes_it_out_of_resample() -> None:
    config = load_config(ModelConfig, packaged_config("model/eagle-x5.yaml"), ["experts.sam=null"])
    assert list(config.experts) == ["clip", "convnext", "eva02", "pix2struct"]
    assert config.branches.overview.mixer.to_dict()["resample"] == {}
