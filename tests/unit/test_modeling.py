"""The fused model: splice, batching, caching, saving, loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from moe_vision.config import load_config, validate
from moe_vision.data.chat import message, render
from moe_vision.data.records import Turn, load_records
from moe_vision.evaluation import answer, evaluate
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import load, save
from moe_vision.modeling.cost import cost, count
from moe_vision.modeling.model_config import ModelConfig
from tests.sliced import pictures
from tests.tiny import tiny_model, tiny_values


@pytest.fixture(scope="module")
def tiny() -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    return tiny_model()


def prompt(processor: MoeVisionProcessor, text: str) -> str:
    return render(processor, [message(Turn("user", text))], generation=True)


def picture(seed: int, height: int = 90, width: int = 140) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def inputs(processor: MoeVisionProcessor, texts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
    made = processor(text=texts, images=images or None, padding=True, add_special_tokens=False, return_tensors="pt")
    return dict(made)


def test_left_padded_batch_equals_one_by_one(tiny: tuple) -> None:
    model, processor = tiny
    texts = ["<image>read label", "which texture", "<image>and<image>how many shapes are there in both of them"]
    texts = [prompt(processor, text) for text in texts]
    images = [picture(seed) for seed in range(3)]
    together = model.generate(**inputs(processor, texts, images), max_new_tokens=6, do_sample=False)[:, -6:]
    parts = [
        inputs(processor, texts[:1], images[:1]),
        inputs(processor, texts[1:2], []),
        inputs(processor, texts[2:], images[1:]),
    ]
    for row, part in zip(together, parts, strict=True):
        assert (
            model.generate(**part, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:].tolist()[:2]
            == row.tolist()[:2]
        )


def test_padding_does_not_change_logits(tiny: tuple) -> None:
    model, processor = tiny
    short, long = prompt(processor, "<image>read"), prompt(processor, "<image>how many shapes are there")
    batch = inputs(processor, [short, long], [picture(0), picture(1)])
    alone = inputs(processor, [short], [picture(0)])
    torch.testing.assert_close(model(**batch).logits[0, -1], model(**alone).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_cached_generation_equals_uncached(tiny: tuple) -> None:
    model, processor = tiny
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    cached = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False))


def test_order_of_images_matters(tiny: tuple) -> None:
    model, processor = tiny
    text = [prompt(processor, "<image><image>read label")]
    one = model(**inputs(processor, text, [picture(0), picture(1)])).logits
    other = model(**inputs(processor, text, [picture(1), picture(0)])).logits
    assert not torch.allclose(one, other, atol=1e-4)


def test_wrong_number_of_placeholders_is_an_error(tiny: tuple) -> None:
    model, processor = tiny
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    batch["input_ids"] = batch["input_ids"][:, 3:]
    batch["attention_mask"] = batch["attention_mask"][:, 3:]
    with pytest.raises(ValueError, match=r"the text has 3 image placeholders .* the images give 4 tokens"):
        model(**batch)


def test_mixed_tokens_stand_for_pixels(tiny: tuple) -> None:
    model, processor = tiny
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    expected = model(**batch).logits
    batch["mixed_tokens"] = model.model.vision_tower(batch.pop("pixel_values")).data
    assert torch.equal(model(**batch).logits, expected)


def test_loss_is_the_mean_over_labels(tiny: tuple) -> None:
    model, processor = tiny
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -2:] = batch["input_ids"][0, -2:]
    out = model(**batch, labels=labels)
    logs = out.logits[0, -3:-1].log_softmax(-1)
    torch.testing.assert_close(out.loss, -logs.gather(1, labels[0, -2:, None]).mean())


@pytest.mark.parametrize("keep", [3, torch.tensor([1, 4, -3])])
def test_logits_to_keep_bound_the_loss(tiny: tuple, keep: int | torch.Tensor) -> None:
    model, processor = tiny
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    whole = model(**batch, labels=batch["input_ids"])
    some = model(**batch, labels=batch["input_ids"], logits_to_keep=keep)
    kept = torch.arange(batch["input_ids"].shape[1])[-keep:] if isinstance(keep, int) else keep
    torch.testing.assert_close(some.logits, whole.logits[:, kept])
    logs = torch.nn.functional.pad(whole.logits[0, :-1].log_softmax(-1), (0, 0, 0, 1))
    following = batch["input_ids"][0].roll(-1)
    learnt = torch.tensor([p for p in kept.tolist() if p != len(following) - 1])
    learnt = learnt[following[learnt] != model.config.image_token_id]
    torch.testing.assert_close(some.loss, -logs[learnt, following[learnt]].mean())


def test_image_tokens_in_labels_are_not_learnt(tiny: tuple) -> None:
    model, processor = tiny
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    prompt_itself = batch["input_ids"]  # as TRL gives it
    without = prompt_itself.masked_fill(prompt_itself == model.config.image_token_id, -100)
    assert torch.equal(model(**batch, labels=prompt_itself).loss, model(**batch, labels=without).loss)
    assert (without == -100).sum() == 4


def test_save_and_load_round_trip(tiny: tuple, tmp_path: Path) -> None:
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = load(tmp_path)
    batch = inputs(processor, [prompt(processor, "<image>read label")], [picture(0)])
    same = inputs(again_processor, [prompt(again_processor, "<image>read label")], [picture(0)])
    assert torch.equal(model(**batch).logits, again(**same).logits)


def test_processor_pads_to_the_canvas(tiny: tuple) -> None:
    _, processor = tiny
    views = processor.image_processor([picture(0, 50, 200)], return_tensors="pt")["pixel_values"]
    assert views.shape == (1, 3, 128, 128)
    torch.testing.assert_close(views[0, :, 0, 0], torch.full((3,), 127 / 255))
    with pytest.raises(ValueError, match=r"\['size'\]: views follow from `slicing`"):
        processor.image_processor([picture(0)], size={"height": 64, "width": 64}, return_tensors="pt")


def test_evaluate_scores_by_task(tiny: tuple, scenes: dict[str, Path]) -> None:
    model, processor = tiny
    records = load_records(scenes["test"])
    report = evaluate(model, processor, records, batch_size=16)
    assert report.count == len(records) and len(report.by_task) == 8
    assert 0 <= report.average < 0.5
    assert report.average == pytest.approx(sum(report.by_task.values()) / 8)


def test_answer_wants_a_marker_for_each_image(tiny: tuple, scenes: dict[str, Path]) -> None:
    model, processor = tiny
    path = load_records(scenes["test"])[0].images[0]
    assert isinstance(answer(model, processor, "read label", [path], 3), str)
    with pytest.raises(ValueError, match="2 <image> markers for 1 images"):
        answer(model, processor, "<image><image>read", [path])


def test_cost_counts_the_model_that_is_built(tiny: tuple) -> None:
    model, processor = tiny
    table = cost(validate(ModelConfig, tiny_values(), source="test"))
    assert table.parameters == count(model)
    assert table.visual_tokens == processor.num_image_tokens((50, 200)) == 4


def test_cost_of_eagle_x5_is_that_of_the_published_system() -> None:
    path = Path(__file__).parents[2] / "configs/model/eagle-x5.yaml"
    table = cost(load_config(ModelConfig, path))
    parts = {part.part: part for part in table.parts}
    assert table.visual_tokens == 1024 and parts["mixers.overview"].channels == 7680
    millions = {name.split(".")[-1]: round(part.parameters / 1e6) for name, part in parts.items() if "experts" in name}
    # The published ConvNeXt counts 846 with its classifier head, which is not built here.
    assert millions == {"clip": 304, "convnext": 843, "sam": 308, "eva02": 303, "pix2struct": 513}
    assert parts["adapters.overview"].parameters == pytest.approx(48.2e6, rel=0.01)
    tera = [part.flops / 1e12 for name, part in parts.items() if "experts" in name]
    assert tera == pytest.approx([0.72, 6.33, 2.98, 3.10, 2.51], rel=0.02)


def test_logits_do_not_depend_on_how_files_are_cut(tmp_path: Path) -> None:
    model, processor = tiny_model(("clip", "sam", "convnext"))
    inputs = processor(images=pictures()[:1], text="<image>what is it", return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits
        for size in ("20KB", "50KB", "5GB"):
            model.save_pretrained(tmp_path / size, max_shard_size=size)
            again = type(model).from_pretrained(tmp_path / size).eval()
            assert torch.equal(again(**inputs).logits, expected)
            assert not [name for name, value in again.named_parameters() if value.data_ptr() % 64]


def test_weights_that_are_cut_or_of_another_shape_are_named(tmp_path: Path) -> None:
    model, processor = tiny_model(("clip",))
    save(model, processor, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be used .*: restore the file"):
        load(tmp_path / "model")
    file.write_bytes(whole)
    state = load_file(file)
    name = next(key for key in state if key.endswith("embed_tokens.weight"))
    save_file({**state, name: state[name][:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"belong to another composition .*mismatched"):
        load(tmp_path / "model")


def test_pictures_in_0_to_1_are_told_by_do_rescale(tiny: tuple) -> None:
    _, processor = tiny
    levels = torch.from_numpy(np.array(picture(0, 90, 200))).permute(2, 0, 1).float()
    expected = processor.image_processor([levels], return_tensors="pt")["pixel_values"]
    found = processor.image_processor([levels / 255], do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert 0.9 < found.max() <= 1


def test_images_listed_by_prompt_are_counted_by_prompt(tiny: tuple) -> None:
    _, processor = tiny
    images = [[picture(0), picture(1)], [picture(2)]]
    with pytest.raises(ValueError, match="prompt 0 marks 1 images and has 2"):
        processor(images=images, text=["<image> x", "<image><image> y"], padding=True, return_tensors="pt")
