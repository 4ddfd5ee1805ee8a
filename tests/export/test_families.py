"""Language models of the families that people use, from their own folder to `transformers serve`.

All seven take a minute and a half on one core. `-k serve` alone, or `-k qwen-3`, runs a part.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from moe_vision.config import validate
from moe_vision.data.records import load_image, load_records
from moe_vision.evaluation import evaluate
from moe_vision.export import export, hf, selftest, verify
from moe_vision.modeling.compose import compose, load
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.training import runner
from moe_vision.training.schedule import TrainConfig
from moe_vision.training.trainer import GroupTrainer
from tests.export.isolated import isolated
from tests.export.scripts.folder import prompt
from tests.export.test_consumers import ask, server
from tests.families import FAMILIES, save_family
from tests.tiny import tiny_values
from tests.unit.toy import write_data

STEPS, SAVED_AT, KILLED_AT = 30, 10, 18
CHAT = [
    {"role": "user", "content": "which colour is it"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "is it black"},
]


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@dataclass(frozen=True)
class Trained:
    """language: the family's folder. output: of a training that was killed once. resumed: steps after that. losses: of
    every step."""

    language: Path
    model: dict[str, Any]
    output: Path
    data: Path
    resumed: list[int]
    losses: list[float]


def train_twice(config: TrainConfig, output: Path) -> list[int]:
    """Train until a kill between two checkpoints, and again to the end; the steps that the second start takes."""
    seen: list[int] = []
    kill = True

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)
            if kill and state.global_step == KILLED_AT:
                raise Killed

    class WatchedTrainer(GroupTrainer):
        def __init__(self, *args: Any, callbacks: list[Any], **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, Watcher()], **kwargs)

    console = Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "GroupTrainer", WatchedTrainer)
        with pytest.raises(Killed):
            runner.train(config, output, console=console)
        assert not (output / "model").exists()
        seen.clear()
        kill = False
        runner.train(config, output, console=console)
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Each family's folder, composed with one miniature expert and trained for 30 steps; made once."""
    made: dict[str, Trained] = {}

    def make(name: str) -> Trained:
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            save_family(name, home / "language")
            data = write_data(home / "data")
            model = tiny_values(("clip",), language_model={"pretrained": str(home / "language")})
            stage = {
                "name": "all", "train": {"adapters": 1e-2, "language_model": 1e-2}, "data": {"path": str(data)},
                "max_steps": STEPS, "batch_size": 8, "save_steps": SAVED_AT, "logging_steps": 1, "warmup_ratio": 0.0,
                "scheduler": "constant",
            }  # fmt: skip
            values = {"model": model, "stages": [stage], "seed": 0}
            resumed = train_twice(validate(TrainConfig, values, source=name), home / "run")
            logs = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
            losses = [log["loss"] for log in logs if "loss" in log]
            made[name] = Trained(home / "language", model, home / "run", data, resumed, losses)
        return made[name]

    return make


@pytest.fixture(scope="module")
def exported(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The export of each family's trained model; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("exports") / name
            export(trained(name).output, folder)
            made[name] = folder
        return made[name]

    return make


def native(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generated(model: Any, ids: torch.Tensor, **settings: Any) -> list[int]:
    torch.manual_seed(3)
    tokens: list[int] = model.generate(ids, max_new_tokens=12, **settings)[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("name", list(FAMILIES))
def test_text_is_the_language_models_own(name: str, trained: Callable[[str], Trained]) -> None:
    """Before training and after it, against transformers' native model with the same weights: logits, answers to a
    chat in the native tokenizer's own template, greedy and sampled, and where they stop."""
    made = trained(name)
    own, tokenizer = native(made.language), AutoTokenizer.from_pretrained(made.language)
    fused, _ = compose(validate(ModelConfig, made.model, source=name))
    after, _ = load(made.output)
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True)["input_ids"]])
    size = own.config.vocab_size
    with torch.inference_mode():
        assert torch.equal(fused.eval()(ids).logits[..., :size], own(ids).logits)
    for model in (fused, after):
        state = model.model.language_model.state_dict()
        embedded = next(key for key in state if key.endswith("embed_tokens.weight"))
        state[embedded] = state[embedded][:size]
        own.base_model.load_state_dict(state)
        own.get_output_embeddings().weight.data.copy_(model.lm_head.weight[:size])
        model.generation_config.suppress_tokens = None  # the image token, which the native model does not know
        for settings in ({}, {"do_sample": False}):
            answer = generated(own, ids, **settings)
            assert generated(model, ids, **settings) == answer
    assert len(answer) < 12 and answer[-1] in after.generation_config.eos_token_id


@pytest.mark.parametrize("name", list(FAMILIES))
def test_thirty_steps_with_a_kill_lower_the_loss(name: str, trained: Callable[[str], Trained]) -> None:
    made = trained(name)
    assert made.resumed == [*range(SAVED_AT + 1, STEPS + 1)] and len(made.losses) == STEPS
    assert made.losses[-1] < 0.5 * made.losses[0]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_answers_end_where_those_that_were_learnt_do(name: str, trained: Callable[[str], Trained]) -> None:
    """The answers are words of the training data and nothing more, so they have ended; three of four are right by the
    word that is most frequent alone."""
    made = trained(name)
    report = evaluate(*load(made.output), load_records(made.data))
    assert report.average >= 0.5 and not report.warnings()
    assert {prediction.prediction.strip() for prediction in report.predictions} <= {"yes", "no"}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_export_keeps_the_generation_config(
    name: str, trained: Callable[[str], Trained], exported: Callable[[str], Path]
) -> None:
    """`export` has loaded and run each folder in a process without moe_vision."""
    kept = json.loads((exported(name) / "generation_config.json").read_text())
    published = json.loads((trained(name).language / "generation_config.json").read_text())
    assert set(published["eos_token_id"]) <= set(kept["eos_token_id"])
    assert {key: kept.get(key) for key in FAMILIES[name].defaults} == FAMILIES[name].defaults


def test_every_export_is_verified(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """`verify` starts a process for each folder; here one does the same for all but one of them."""
    first, *others = FAMILIES
    assert verify(exported(first))["max_difference"] <= 1e-5
    pairs: list[Path] = []
    for name in others:
        fixture = tmp_path / name
        fixture.mkdir()
        hf.write_fixture(fixture, *load(exported(name)))
        pairs += [exported(name), fixture]
    found = isolated("selftests", selftest.__file__, *pairs, home=tmp_path / "home")
    assert [seen["max_difference"] <= 1e-5 and seen["new_tokens"] > 0 for seen in found] == [True] * len(others)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One `transformers serve` for all folders: it loads the one that a request names."""
    with server(None, tmp_path_factory.mktemp("server") / "home") as found:
        yield found


@pytest.mark.parametrize("name", list(FAMILIES))
def test_transformers_serve_answers(
    name: str, address: str, trained: Callable[[str], Trained], exported: Callable[[str], Path]
) -> None:
    """As `generate` does from the prompt that training has: the same text, and the same number of tokens."""
    folder, made = exported(name), trained(name)
    model, processor = load(made.output)
    records = load_records(made.data)[:2]
    for record in records:
        image = record.images[0]
        question = record.turns[0].text.removeprefix("<image>\n")
        uri = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
        reply = json.loads(ask(address, folder, content, max_tokens=12))
        inputs = processor(
            images=[load_image(image)], text=prompt(processor, question), add_special_tokens=False, return_tensors="pt"
        )
        views = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
        tokens = generated(model, inputs["input_ids"], do_sample=False, **views)
        assert reply["choices"][0]["message"]["content"] == processor.decode(tokens, skip_special_tokens=True)
        assert reply["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
