"""The local branch, from pictures of any size to logits and gradients, on tiny models of several compositions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moe_vision.config import ConfigError, validate
from moe_vision.data.chat import message, render
from moe_vision.data.collate import Collator, ConversationDataset, views_of
from moe_vision.data.records import Turn, load_records
from moe_vision.evaluation import answer, evaluate
from moe_vision.experts.weights import load_expert_weights
from moe_vision.fusion.cell import CellConfig, sampling_matrix
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import load, marker_ids, save
from moe_vision.modeling.cost import cost, count
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.slicing import PlanError
from moe_vision.slicing.pack import pack
from moe_vision.training.groups import parameter_groups
from moe_vision.training.runner import train
from moe_vision.training.schedule import TrainConfig
from moe_vision.types import TokenShape, VisualTokens
from tests.sliced import COMPOSITIONS, FREE, QUERIES, SIZES, UHD, pictures
from tests.tiny import tiny_model, tiny_tokenizer, tiny_values
from tests.unit.toy import train_values

NAMES = list(COMPOSITIONS)
Tiny = tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A composition with the experts' real weights: SAM's own initial ones are too small for a gradient."""
    model, processor = tiny_model(**COMPOSITIONS[request.param])
    for expert in model.model.vision_tower.experts.values():
        load_expert_weights(expert, "default")
    return model, processor


def prompt(processor: MoeVisionProcessor, text: str) -> str:
    return render(processor, [message(Turn("user", text))], generation=True)


def inputs(processor: MoeVisionProcessor, texts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
    prompts = [prompt(processor, text) for text in texts]
    return dict(processor(text=prompts, images=images, padding=True, add_special_tokens=False, return_tensors="pt"))


def test_placeholders_are_what_the_plans_promise(tiny: Tiny) -> None:
    model, processor = tiny
    batch = inputs(processor, ["<image>read label", "<image>and<image>"], pictures())
    counts = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    plans = [model.model.policy.plan(size, images) for size, images in zip(SIZES, (1, 2, 2), strict=True)]
    assert counts == [plans[0].num_tokens, plans[1].num_tokens + plans[2].num_tokens]
    sizes = [[90, 140, 1], [200, 64, 2], [64, 64, 2]]  # of each image, once for each of its views
    assert batch["image_sizes"].tolist() == [size for size, plan in zip(sizes, plans, strict=True) for _ in plan.views]
    assert len(batch["pixel_values"]) == sum(len(plan.views) for plan in plans)


@torch.no_grad()
def test_views_of_a_batch_are_encoded_in_buckets_of_one_size(tiny: Tiny) -> None:
    model, processor = tiny
    batch = inputs(processor, ["<image>read label"] * 3, pictures())
    policy, vision = model.model.policy, model.config.vision_config
    plans = [policy.plan(size) for size in SIZES]
    markers = model.model.marker_embeddings()
    tower = model.model.vision_tower
    views = iter(batch["pixel_values"])
    expected = []
    for plan in plans:  # every view alone, without the others' padding
        features = []
        for view in plan.views:
            (height, width), branch = view.size, vision.branch_of(view.role)
            mixed = tower(next(views)[None, :, :height, :width], branch)
            features.append(model.model.adapt(branch, mixed).data[0])
        expected.append(pack(plan, features, markers))

    calls: list[int] = []
    hook = tower.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
    found = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True).pooler_output
    hook.remove()
    for ours, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
    buckets = {(vision.branch_of(view.role), view.size) for plan in plans for view in plan.views}
    assert len(calls) == len(buckets) and sum(calls) == len(batch["pixel_values"])


@torch.no_grad()
def test_a_batch_of_mixed_sizes_equals_one_by_one(tiny: Tiny) -> None:
    model, processor = tiny
    images, texts = pictures(), ["<image>and<image>how many shapes", "which texture", "<image>read label"]
    batch = inputs(processor, texts, images)
    parts = [inputs(processor, texts[:1], images[:2]), inputs(processor, texts[2:], images[2:])]
    logits = model(**batch).logits[:, -1]
    for row, part in zip((0, 2), parts, strict=True):
        torch.testing.assert_close(logits[row], model(**part).logits[0, -1], atol=1e-3, rtol=1e-3)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        together = model.generate(**batch, **settings, num_beams=beams)[:, -4:]
        alone = [model.generate(**part, **settings, num_beams=beams)[0, -4:] for part in parts]
        assert together[[0, 2]].tolist() == [tokens.tolist() for tokens in alone]


def test_gradients_reach_every_parameter(tiny: Tiny) -> None:
    model, processor = tiny
    batch = inputs(processor, ["<image>read label"] * 3, pictures())
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    model.zero_grad()
    assert not untouched


def test_cells_learn_after_an_evaluation() -> None:
    """What is kept between calls may have been made in inference mode, whose tensors no gradient may pass."""
    sampling_matrix.cache_clear()
    shape = TokenShape(12, 32, (3, 4))
    cells = CellConfig(num_queries=4).build(shape, 32)
    tokens = VisualTokens(torch.randn(2, 12, 32), (3, 4))
    with torch.inference_mode():
        evaluated = cells(tokens).data
    trained = cells(VisualTokens(tokens.data.clone().requires_grad_(), (3, 4))).data
    trained.sum().backward()
    torch.testing.assert_close(trained.detach(), evaluated)
    assert all(parameter.grad is not None for parameter in cells.parameters())


@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_logits(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    save(model, processor, tmp_path / "model")
    again, again_processor = load(tmp_path / "model")
    texts, images = ["<image>read label", "<image>and<image>"], pictures()
    batch, same = inputs(processor, texts, images), inputs(again_processor, texts, images)
    assert all(torch.equal(batch[name], same[name]) for name in batch)
    assert torch.equal(model(**batch).logits, again(**same).logits)


@pytest.mark.parametrize("name", NAMES)
def test_cost_counts_the_model_that_is_built(name: str) -> None:
    model, processor = tiny_model(**COMPOSITIONS[name])
    config = validate(ModelConfig, tiny_values(**COMPOSITIONS[name]), source="test")
    for size in SIZES:
        table = cost(config, size)
        assert table.parameters == count(model)
        plan, selector = processor.image_processor.plan(size), config.branches.selector
        local = sum(plan.local_tokens)
        kept = local if selector is None else selector.kept(local)
        assert table.visual_tokens == plan.num_tokens - (0 if kept is None else local - kept)


def test_training_batches_hold_views_of_every_size(tiny: Tiny, tmp_path: Path) -> None:
    model, processor = tiny
    items = []
    for i, image in enumerate(pictures()):
        image.save(tmp_path / f"{i}.png")
        made = inputs(processor, ["<image>read label"], [image])
        views = views_of([tmp_path / f"{i}.png"], processor)
        assert torch.equal(views["pixel_values"], made["pixel_values"])
        ids = made["input_ids"][0].tolist()
        items.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:], **views})
    collate = Collator(processor.tokenizer.pad_token_id)
    with torch.no_grad():
        together = model(**collate(items)).loss
        alone = [model(**collate([item])).loss for item in items]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_markers_are_tokens_of_the_tokenizer_in_use() -> None:
    model, processor = tiny_model(**COMPOSITIONS["uhd, cells"])
    batch = inputs(processor, ["<image>read label"], pictures()[:1])
    (tokens,) = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True).pooler_output
    table = model.get_input_embeddings().weight
    # 90x140 pixels are two rows of two slices: four tokens and a comma, four tokens and a line's end, ...
    comma, line_end = (processor.tokenizer.convert_tokens_to_ids(symbol) for symbol in (",", "\u010a"))
    assert None not in (comma, line_end)
    expected = {4: comma, 9: line_end, 14: comma, 19: line_end}
    assert model.model.policy.plan((90, 140)).grid == (2, 2) and len(tokens) == 24
    for place, token in expected.items():
        assert torch.equal(tokens[place], table[token])


def test_a_marker_that_is_no_single_token_is_refused() -> None:
    config = validate(
        ModelConfig,
        tiny_values(**COMPOSITIONS["uhd, cells"] | {"slicing": UHD | {"row_end": "<line>"}}),
        source="test",
    )
    with pytest.raises(ValueError, match=r"slicing 'uhd' marks with '<line>' \(row_end\), which is no single token"):
        marker_ids(config, tiny_tokenizer())


def test_learnt_markers_train_with_the_adapters() -> None:
    model, _ = tiny_model(**COMPOSITIONS["oryx"])
    trained = {name for name, _ in parameter_groups(model)["adapters"]}
    names = ("image_begin", "image_newline", "image_separator", "image_end")
    assert set(model.model.markers) == set(names) and {f"model.markers.{name}" for name in names} <= trained


def test_slices_need_their_sizes(tiny: Tiny) -> None:
    model, processor = tiny
    batch = inputs(processor, ["<image>read label"], pictures()[:1])
    sizes = batch.pop("image_sizes")
    with pytest.raises(ValueError, match="needs pixel_values and image_sizes: give both"):
        model(**batch)
    more = torch.cat((batch["pixel_values"], batch["pixel_values"][:1]))
    with pytest.raises(ValueError, match=rf"have {len(sizes)} views, image_sizes holds .* pixel_values {len(more)}:"):
        model(**{**batch, "pixel_values": more, "image_sizes": sizes})
    with pytest.raises(ValueError, match=rf"image_sizes holds {len(sizes) + 1} and pixel_values {len(sizes)}:"):
        model(**{**batch, "image_sizes": torch.cat((sizes, sizes[:1]))})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"branches": {"overview": {"mixer": FREE, "adapter": QUERIES}}}, "cuts slices that no branch takes"),
        (
            {
                "branches": {
                    "overview": {"mixer": FREE, "adapter": QUERIES},
                    "slices": {"mixer": FREE, "adapter": QUERIES},
                    "shared": True,
                }
            },
            "branches has slices, and shared is true",
        ),
        (
            {"branches": {"shared": True, "overview": {"experts": ["clop"], "mixer": FREE, "adapter": QUERIES}}},
            "names the expert 'clop'; did you mean 'clip'",
        ),
        (
            {"branches": {"shared": True, "overview": {"experts": ["clip"], "mixer": FREE, "adapter": QUERIES}}},
            r"experts ['sam'] are in no branch",
        ),
        ({"slicing": {"type": "none"}}, "takes slices and slicing 'none' cuts none"),
        ({"slicing": UHD | {"tokens_per_view": 9}}, "tokens_per_view 9 of slicing 'uhd': this model makes 4"),
        (
            {"branches": {"shared": True, "overview": {"mixer": FREE, "adapter": {"type": "mlp", "positions": True}}}},
            "is made for a grid of (4, 4) and slicing gives it views of",
        ),
        (
            {"branches": {"shared": True, "overview": {"mixer": FREE, "adapter": {"type": "mlp", "pool": 2}}}},
            "pool 2 of mlp does not divide the grid",
        ),
        ({"slicing": UHD | {"patch_size": 14}}, "is not a multiple of its stride of 16 px"),
        (
            {"slicing": {"type": "native"}, "branches": {"overview": {"mixer": FREE, "adapter": QUERIES}}},
            "slicing 'native' makes views of [56, 84] pixels",
        ),
        (
            {
                "slicing": {"type": "native", "factor": 32},
                "branches": {"overview": {"mixer": FREE, "adapter": {"type": "mlp"}}},
            },
            "slicing 'native' with factor 32 promises [2, 3] tokens of a view of [64, 96] pixels",
        ),
    ],
)
def test_compositions_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    name = "uhd, two experts, all views through one branch"
    with pytest.raises(ConfigError) as caught:
        validate(ModelConfig, tiny_values(**COMPOSITIONS[name] | changes), source="test")
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["uhd, other experts for slices", "anyres"])
def test_sliced_models_train_and_answer(name: str, tmp_path: Path) -> None:
    values = train_values(tmp_path, max_steps=2, batch_size=4)
    for path in (tmp_path / "data").glob("*.png"):
        Image.open(path).resize((140, 90)).save(path)
    tokenizer_folder = values["model"]["language_model"]["tokenizer"]
    values["model"] |= tiny_values(**COMPOSITIONS[name])
    values["model"]["language_model"]["tokenizer"] = tokenizer_folder
    values["stages"][1]["train"]["experts"] = 1e-3
    output = tmp_path / "out"
    folder = train(TrainConfig.model_validate(values), output)
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert {log["run"] for log in logs} == {"01-projector", "02-finetune"} and all(0 < loss < 20 for loss in losses)
    model, processor = load(folder)
    records = load_records(tmp_path / "data" / "data.json")
    together, alone = (evaluate(model, processor, records, batch_size=size) for size in (8, 1))
    assert together.count == 8 and together.predictions == alone.predictions


def test_a_picture_that_the_slicing_refuses_is_named(tmp_path: Path) -> None:
    model, processor = tiny_model(**COMPOSITIONS["native"])
    Image.new("RGB", (2010, 10)).save(tmp_path / "strip.png")
    with pytest.raises(PlanError, match=r"strip\.png': an image of 10x2010 pixels is longer than 200 times"):
        answer(model, processor, "what is it", [tmp_path / "strip.png"])
    (tmp_path / "data.json").write_text(
        json.dumps(
            [
                {
                    "image": "strip.png",
                    "conversations": [{"from": "human", "value": "<image>is it"}, {"from": "gpt", "value": "yes"}],
                }
            ]
        )
    )
    with pytest.raises(PlanError, match=r"strip\.png'"):
        ConversationDataset(load_records(tmp_path / "data.json"), processor)
