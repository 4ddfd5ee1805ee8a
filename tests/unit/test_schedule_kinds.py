"""Pre-alignment and alternation: who trains at which step, what is kept, and that a kill changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, set_seed

from moe_vision.config import ConfigError, validate
from moe_vision.data.chat import tokenise
from moe_vision.data.records import load_records
from moe_vision.experts.shards import read_file, read_files
from moe_vision.experts.weights import load_expert_weights, resolve, spec_source
from moe_vision.modeling.compose import compose
from moe_vision.modeling.cost import TEXT_TOKENS, cost
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training import runner
from moe_vision.training.groups import parameter_groups
from moe_vision.training.loading import model_config
from moe_vision.training.plan import plan_schedule
from moe_vision.training.prealign import alone
from moe_vision.training.runner import train
from moe_vision.training.schedule import StageConfig, TrainConfig
from moe_vision.training.trainer import GroupTrainer
from moe_vision.training.turns import Turns, total_steps
from tests.unit.test_training import Killed, assert_same, train_killed, weights
from tests.unit.toy import train_values

PREALIGN = {"prealign": {"expert": 1e-2, "projector": 1e-2}}
ALTERNATE = {"alternate": [{"train": {"adapters": 1e-2}, "steps": 2}, {"train": {"language_model": 1e-2}, "steps": 1}]}


def schedule(folder: Path, *kinds: dict[str, Any], **stage: Any) -> TrainConfig:
    """Stages of these kinds, over a language model that has weights."""
    values = train_values(folder, **stage)
    language = values["model"]["language_model"]
    if not (folder / "language").is_dir():
        set_seed(11)
        architecture = dict(language["architecture"])
        model_type = architecture.pop("model_type")
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **architecture)).save_pretrained(
            folder / "language"
        )
    values["model"]["language_model"] = {"pretrained": str(folder / "language"), "tokenizer": language["tokenizer"]}
    common = {key: value for key, value in values["stages"][0].items() if key not in ("name", "train")}
    values["stages"] = [{"name": f"s{i}", **common, **kind} for i, kind in enumerate(kinds)]
    return TrainConfig.model_validate(values)


def metrics(output: Path) -> list[dict[str, Any]]:
    """Logs without what a clock says."""
    kept = ("run", "step", "loss", "grad_norm", "learning_rate")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in kept if key in line} for line in lines if "loss" in line]


def test_runs_of_a_schedule(tmp_path: Path) -> None:
    config = schedule(tmp_path, PREALIGN, {"train": {"adapters": 1e-3}}, ALTERNATE)
    assert [(run.name, run.expert) for run in config.runs(["clip", "sam"])] == [
        ("01-s0-clip", "clip"),
        ("02-s0-sam", "sam"),
        ("03-s1", None),
        ("04-s2", None),
    ]
    some = schedule(tmp_path, {"prealign": {**PREALIGN["prealign"], "experts": ["sam"]}})
    assert [run.name for run in some.runs(["clip", "sam"])] == ["01-s0-sam"]
    with pytest.raises(ValueError, match="names 'sam': did you mean"):
        some.runs(["clip", "ham"])


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([{}], "found none of them; give exactly one"),
        ([{**PREALIGN, "train": {"adapters": 1e-3}}], "found train and prealign"),
        ([{"train": {"adapters": 1e-3}}, PREALIGN], "put it first"),
        ([{"prealign": {"expert": 2.0, "projector": 1e-3}}], "learning rate 2.0 of 'expert'"),
        ([{"prealign": {"expert": 1e-3}}], "prealign.projector"),
        ([{"prealign": {**PREALIGN["prealign"], "experts": ["sam", "sam"]}}], "named twice"),
        ([{"alternate": [{"train": {"adapters": 1e-3}, "steps": 2}]}], "at least 2"),
        (
            [{"alternate": [{"train": {"experts": 1e-3}, "steps": 2}, {"train": {"experts.sam": 1e-3}, "steps": 2}]}],
            "two turns",
        ),
        (
            [{"alternate": [{"train": {"adapters": 1e-3}}, {"train": {"mixers": 1e-3}, "steps": 2}]}],
            "steps and epochs of a turn",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_a_schedule(kinds: list[dict[str, Any]], message: str) -> None:
    stages = [{"name": f"s{i}", "max_steps": 1, **kind} for i, kind in enumerate(kinds)]
    with pytest.raises(ConfigError) as error:
        validate(TrainConfig, {"model": "m.yaml", "stages": stages}, source="test")
    assert message in str(error.value)


def test_turns_follow_from_the_step() -> None:
    turns = Turns((frozenset({"adapters"}), frozenset({"language_model"})), (2, 1))
    names = "".join(next(iter(turns.at(step)))[0] for step in range(7))
    assert names == "aalaala"
    assert turns.all() == {"adapters", "language_model"}
    stage = StageConfig(name="s", epochs=1.5, batch_size=4, gradient_accumulation=2, train={"adapters": 1e-3})
    assert total_steps(17, stage) == 5 and total_steps(17, stage, processes=2) == 3


def test_prealign_keeps_the_experts_and_nothing_else(tmp_path: Path) -> None:
    config = schedule(tmp_path, PREALIGN)
    set_seed(config.seed)
    before, _ = compose(model_config(config))
    finished = train(config, tmp_path / "out")
    after = weights(finished)
    for name, members in parameter_groups(before).items():
        moved = [key for key, value in members if key in after and not torch.equal(after[key], value)]
        assert bool(moved) == name.startswith("experts."), name
    assert sorted(path.name for path in (tmp_path / "out/experts").iterdir()) == [
        "clip.safetensors",
        "sam.safetensors",
    ]
    # What lies there is what a config takes as `pretrained`.
    for name in ("clip", "sam"):
        expert: Any = before.model.vision_tower.experts[name]
        path = tmp_path / f"out/experts/{name}.safetensors"
        published = read_files(resolve(spec_source(expert.config.spec), expert.config.spec))
        assert read_file(path).keys() == published.keys()
        load_expert_weights(expert, str(path))
        prefix = f"model.vision_tower.experts.{name}."
        assert all(torch.equal(value, after[prefix + key]) for key, value in expert.state_dict().items())


def test_prealign_trains_under_the_frozen_language_model_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}

    class Watching(GroupTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            model: Any = self.model
            causal = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
            frozen = model.model.language_model.state_dict()
            assert all(torch.equal(value, frozen[key]) for key, value in causal.base_model.state_dict().items())
            result = super().train(*args, **kwargs)
            assert all(torch.equal(value, frozen[key]) for key, value in causal.base_model.state_dict().items())
            seen[self.args.output_dir.rsplit("/", 1)[1]] = [*model.model.vision_tower.experts]
            return result

    monkeypatch.setattr(runner, "GroupTrainer", Watching)
    train(schedule(tmp_path, PREALIGN, max_steps=2), tmp_path / "out")
    assert seen == {"01-s0-clip": ["clip"], "02-s0-sam": ["sam"]}


def test_prealign_needs_a_language_model_that_has_been_trained(tmp_path: Path) -> None:
    values = train_values(tmp_path)
    values["stages"] = [{**{k: v for k, v in values["stages"][0].items() if k != "train"}, **PREALIGN}]
    with pytest.raises(ValueError, match=r"language_model\.pretrained is null"):
        train(TrainConfig.model_validate(values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_alone_has_the_fused_models_grid_projector_and_canvas(tmp_path: Path) -> None:
    config = model_config(schedule(tmp_path, PREALIGN))
    one = alone(config, "sam")
    assert list(one.experts) == ["sam"]
    assert one.branches.overview.mixer == config.branches.overview.mixer
    assert one.branches.overview.adapter == config.branches.overview.adapter
    assert one.vision_config().canvas_size() == config.vision_config().canvas_size()
    values = config.to_plain()
    values["branches"]["overview"] = {
        "mixer": {"type": "deformable", "base": "sam"},
        "adapter": {"type": "perceiver", "num_queries": 4},
    }
    injected = validate(ModelConfig, values, source="test")
    one = alone(injected, "clip")
    assert one.branches.overview.mixer.type_name == "channel_concat"
    assert one.branches.overview.adapter.type_name == "mlp"
    assert one.vision_config().mixed_shape("overview").grid == injected.vision_config().mixed_shape("overview").grid


def test_only_some_runs_and_the_rest_later_is_all_at_once(tmp_path: Path) -> None:
    config = schedule(tmp_path, PREALIGN, {"train": {"adapters": 1e-2}}, max_steps=2)
    whole = weights(train(config, tmp_path / "whole"))
    assert train(config, tmp_path / "parts", only=["02-s0-sam"]) == tmp_path / "parts"
    assert [path.name for path in (tmp_path / "parts/experts").iterdir()] == ["sam.safetensors"]
    assert_same(weights(train(config, tmp_path / "parts")), whole)
    for name, message in (("03-s1", "is no run of its own"), ("02-s0-ham", "02-s0-sam")):
        with pytest.raises(ConfigError, match=message):
            train(config, tmp_path / "other", only=[name])


def test_an_expert_that_another_config_aligned_is_refused(tmp_path: Path) -> None:
    config = schedule(tmp_path, PREALIGN, {"train": {"adapters": 1e-2}}, max_steps=1)
    train(config, tmp_path / "one", only=["01-s0-clip"])
    other = config.model_copy(update={"seed": 9})
    train(other, tmp_path / "two", only=["02-s0-sam"])
    (tmp_path / "two/experts/clip.safetensors").write_bytes((tmp_path / "one/experts/clip.safetensors").read_bytes())
    with pytest.raises(ValueError, match="was not aligned by this config"):
        train(other, tmp_path / "two")


@pytest.mark.parametrize(
    ("run", "step"), [("01-s0-clip", 3), ("02-s0-sam", 2), ("03-s1", 2), ("03-s1", 3), ("03-s1", 5)]
)
def test_killed_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, step: int
) -> None:
    config = schedule(tmp_path, PREALIGN, ALTERNATE, max_steps=6, save_steps=1)
    whole = weights(train(config, tmp_path / "whole"))
    train_killed(monkeypatch, config, tmp_path / "killed", run, step)
    assert_same(weights(train(config, tmp_path / "killed")), whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_killed_between_runs_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = schedule(tmp_path, PREALIGN, {"train": {"adapters": 1e-2}}, max_steps=2)
    whole = weights(train(config, tmp_path / "whole"))
    for name in ("save_expert", "load_aligned", "save"):  # before an expert is kept, before it is used, before the end
        with monkeypatch.context() as patched:

            def die(*args: Any) -> None:
                raise Killed

            patched.setattr(runner, name, die)
            with pytest.raises(Killed):
                train(config, tmp_path / "killed")
    assert_same(weights(train(config, tmp_path / "killed")), whole)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_alternation_trains_exactly_the_group_whose_turn_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """At every step: only its weights move, only its optimizer state does, and the others' state stays as it was."""
    history: list[dict[str, dict[str, torch.Tensor]]] = []

    def snapshot(model: Any, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
        return {
            group: {
                name: torch.cat([p.detach().flatten(), *(
                    optimizer.state[p]["exp_avg_sq"].flatten() for _ in [0] if optimizer.state.get(p)
                )])
                for name, p in members
            }
            for group, members in parameter_groups(model).items()
        }  # fmt: skip

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
            history.append(snapshot(model, getattr(optimizer, "optimizer", optimizer)))

    class Watching(GroupTrainer):
        def __init__(self, *args: Any, callbacks: list[Any], **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, Watcher()], **kwargs)

    monkeypatch.setattr(runner, "GroupTrainer", Watching)
    config = schedule(
        tmp_path, ALTERNATE, max_steps=7, scheduler="constant", warmup_ratio=0.0, weight_decay=0.1,
        gradient_accumulation=accumulation,
    )  # fmt: skip
    train(config, tmp_path / "out")
    order = ["adapters", "adapters", "language_model"] * 3
    for step in range(1, 7):
        for group, now in history[step].items():
            same = all(torch.equal(value, history[step - 1][group][name]) for name, value in now.items())
            assert same == (group != order[step]), (step, group)


def test_one_turn_after_the_other_is_two_stages_first_steps(tmp_path: Path) -> None:
    """Before a group's second turn an alternation is stages in a row: each group starts from a fresh state."""
    constant = {"scheduler": "constant", "warmup_ratio": 0.0, "cache_features": False}
    config = schedule(tmp_path, ALTERNATE, max_steps=2, **constant)
    stages = schedule(tmp_path, {"train": {"adapters": 1e-2}}, max_steps=2, **constant)
    assert_same(weights(train(config, tmp_path / "a")), weights(train(stages, tmp_path / "b")))


def test_the_plan_says_what_will_happen(tmp_path: Path) -> None:
    config = schedule(tmp_path, PREALIGN, ALTERNATE, {"train": {"language_model": 1e-3}}, max_steps=6)
    clip, sam, alternating, joint = plan_schedule(config, model_config(config))
    assert [run.name for run in (clip, sam, alternating, joint)] == ["01-s0-clip", "02-s0-sam", "03-s1", "04-s2"]
    assert set(clip.trains) == {"experts.clip", "adapters"} and set(clip.frozen) == {"language_model"}
    assert alternating.turns == [(["adapters"], 2), (["language_model"], 1)] and not joint.turns
    assert (joint.records, joint.steps, joint.batch) == (8, 6, 2)
    assert joint.tokens is not None and joint.flops is not None and clip.flops is not None
    model, processor = compose(model_config(config))
    records = load_records(str(config.stages[0].data.path))  # type: ignore[union-attr]
    mean = sum(len(tokenise(record, processor).input_ids) for record in records) / len(records)
    assert joint.tokens == round(12 * mean)
    counts = {group: sum(p.numel() for _, p in members) for group, members in parameter_groups(model).items()}
    assert joint.trains["language_model"] == (counts["language_model"], 1e-3)
    assert joint.frozen["adapters"] == counts["adapters"]
    # By hand: eight records of one picture; a frozen expert sees each picture once, all else all twelve of six steps.
    part = {part.part: part.flops for part in cost(model_config(config)).parts}
    language = part["language_model"] / (4 + TEXT_TOKENS) * mean
    experts = part["experts.clip"] + part["experts.sam"]
    fusion = part["mixers.overview"] + part["adapters.overview"]
    assert joint.flops == pytest.approx(8 * experts + 12 * fusion + 12 * 2 * language, rel=1e-6)
    later = config.stages[2].model_copy(update={"data": None, "max_steps": None, "epochs": 1.0})
    (run,) = plan_schedule(config.model_copy(update={"stages": [later]}), model_config(config))
    assert (run.records, run.steps, run.tokens, run.flops) == (None, None, None, None)
