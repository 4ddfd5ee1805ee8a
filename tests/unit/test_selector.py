"""The selector of local tokens: what it keeps, what the language model sees of it, and what it learns from."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import TextStreamer

from moe_vision.config import ConfigError, validate
from moe_vision.data.chat import message, render
from moe_vision.data.records import Record, Turn
from moe_vision.evaluation import answer, evaluate
from moe_vision.fusion import SELECTORS
from moe_vision.fusion.selector import cosine_max, nucleus
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.cost import cost
from moe_vision.modeling.model_config import ModelConfig
from moe_vision.modeling.turns import question_mask, turns_of
from moe_vision.slicing import SLICING
from moe_vision.slicing.pack import places
from moe_vision.training.groups import learning_rates, parameter_groups
from tests.sliced import COMPOSITIONS, FREE, pictures
from tests.tiny import tiny_model, tiny_tokenizer, tiny_values

Tiny = tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]
SLIME = COMPOSITIONS["slime, its own adapters and a selector"]
SIMILARITY: dict[str, Any] = {"type": "similarity", "projection_size": 16}
TEXTS = ["<image>how many shapes", "<image>which texture<image>", "read label", "<image>read label"]
SIZES = [(90, 140), (200, 64), (64, 64), (64, 200)]


def composition(selector: dict[str, Any] | None) -> dict[str, Any]:
    return {**SLIME, "branches": {**SLIME["branches"], "selector": selector}}


def tiny(selector: dict[str, Any] | None) -> Tiny:
    return tiny_model(**composition(selector))


def inputs(processor: MoeVisionProcessor, texts: list[str], images: Any) -> dict[str, torch.Tensor]:
    prompts = [render(processor, [message(Turn("user", text))], generation=True) for text in texts]
    return dict(processor(text=prompts, images=images or None, padding=True, add_special_tokens=False,
                          return_tensors="pt"))  # fmt: skip


def batch_of(processor: MoeVisionProcessor) -> dict[str, torch.Tensor]:
    return inputs(processor, TEXTS, pictures(SIZES))


@torch.no_grad()
@pytest.mark.parametrize("budget", [{"top_k": 10_000}, {"top_p": 1.0}])
def test_a_budget_of_all_keeps_all(budget: dict[str, Any]) -> None:
    model, processor = tiny(SIMILARITY | budget)
    batch = batch_of(processor)
    found = model(**batch)
    assert torch.equal(found.attention_mask, batch["attention_mask"])
    without, _ = tiny(None)
    without.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(found.logits, without(**batch, position_ids=positions(batch)).logits)


def positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "selector",
    [
        SIMILARITY | {"top_k": 5},
        SIMILARITY | {"top_p": 0.6, "reduce": "mean"},
        {"type": "published", "top_p": 0.5},
    ],
)
def test_a_batch_equals_its_prompts_one_by_one(selector: dict[str, Any]) -> None:
    model, processor = tiny(selector)
    batch, images = batch_of(processor), pictures(SIZES)
    parts = [inputs(processor, TEXTS[:1], images[:1]), inputs(processor, TEXTS[1:2], images[1:3]),
             inputs(processor, TEXTS[2:3], []), inputs(processor, TEXTS[3:], images[3:])]  # fmt: skip
    found = model(**batch)
    kept = found.attention_mask.sum(1).tolist()
    assert kept[0] != kept[1] and sum(kept) < batch["attention_mask"].sum()
    for row, part in enumerate(parts):
        alone = model(**part)
        if alone.attention_mask is not None:
            assert alone.attention_mask.sum() == kept[row]
        torch.testing.assert_close(found.logits[row, -1], alone.logits[0, -1], atol=1e-4, rtol=1e-4)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        together = model.generate(**batch, **settings, num_beams=beams)[:, -4:]
        alone_ids = [model.generate(**part, **settings, num_beams=beams)[0, -4:] for part in parts]
        assert together.tolist() == [ids.tolist() for ids in alone_ids]
    several = model.generate(**batch, **settings, num_beams=2, num_return_sequences=2)
    assert torch.equal(several[:, :-4], batch["input_ids"].repeat_interleave(2, dim=0))


@torch.no_grad()
def test_dropped_tokens_are_as_if_they_were_not_there() -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 5})
    batch = batch_of(processor)
    found = model(**batch)
    valid = found.attention_mask.bool()
    local = [torch.tensor(processor.image_processor.plan(size).local_tokens).sum().item() for size in SIZES]
    dropped = [batch["attention_mask"][row].sum() - valid[row].sum() for row in range(4)]
    assert dropped == [local[0] - 5, local[1] + local[2] - 10, 0, local[3] - 5]
    encoded = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    embeddings = model.model.splice(batch["input_ids"], embeddings, torch.cat(encoded.pooler_output))
    for row in range(4):
        alone = model.model.language_model(inputs_embeds=embeddings[row][valid[row]][None]).last_hidden_state
        torch.testing.assert_close(found.logits[row, valid[row]], model.lm_head(alone)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_drops_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 5})
    everything, _ = tiny(None)
    batch = inputs(processor, TEXTS[:1], pictures(SIZES[:1]))
    length, local = batch["input_ids"].shape[1], 16
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**batch, **settings, output_logits=True)
    whole = everything.generate(**batch, **settings)
    assert found.past_key_values.get_seq_length() == length - local + 5 + 2
    assert whole.past_key_values.get_seq_length() == length + 2
    assert torch.equal(found.sequences[:, :length], batch["input_ids"]) and found.sequences.shape == (1, length + 3)
    masked = model(**batch)  # the same tokens, hidden by the mask
    torch.testing.assert_close(found.logits[0], masked.logits[:, -1], atol=1e-4, rtol=1e-4)
    ids, mask = batch["input_ids"], masked.attention_mask
    for i in range(3):  # and so at every further token
        ids = torch.cat([batch["input_ids"], found.sequences[:, length : length + i]], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(1, i, dtype=torch.long)], dim=1)
        step = model(**{**batch, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
        torch.testing.assert_close(found.logits[i], step, atol=1e-4, rtol=1e-4)
    total = model.generate(**batch, do_sample=False, max_length=length + 2, eos_token_id=-1)
    assert total.shape[1] == length + 2
    sampled = model.generate(**batch, do_sample=True, num_return_sequences=3, max_new_tokens=2, eos_token_id=-1)
    assert sampled.shape == (3, length + 2) and torch.equal(sampled[2:, :length], batch["input_ids"])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**batch, do_sample=False, max_new_tokens=2, streamer=streamer)
    assert capsys.readouterr().out.strip()


@torch.no_grad()
def test_a_quarter_of_the_local_tokens_is_a_quarter_of_their_cost() -> None:
    """Counted, not timed: FLOPs of the prefill's linear layers, and bytes of the cache."""
    kept = 16
    adapter = {"type": "query_compressor", "num_queries": 16, "num_heads": 2}
    branches = {
        "overview": {"mixer": FREE, "adapter": {"type": "perceiver", "num_queries": 1, "num_heads": 2}},
        "slices": {"mixer": FREE, "adapter": adapter},
    }
    slicing = {"type": "slime", "tile_size": 64, "max_tiles": 4}
    counted = []
    for selector in (SIMILARITY | {"top_k": kept}, None):
        model, processor = tiny_model(
            experts=SLIME["experts"], branches={**branches, "selector": selector}, slicing=slicing
        )
        batch = inputs(processor, ["<image>read label"], pictures([(128, 128)]))
        encoded = model.get_image_features(batch.pop("pixel_values"), batch.pop("image_sizes"), return_dict=True)
        with FlopCounterMode(display=False) as counter:
            out = model.generate(**batch, mm_encoder_outputs={"image": encoded}, max_new_tokens=1, do_sample=False,
                                 return_dict_in_generate=True)  # fmt: skip
        (flops,) = (f for name, f in counter.get_flop_counts().items() if name.endswith(".language_model"))
        linear = sum(number for operator, number in flops.items() if str(operator) in ("aten.mm", "aten.addmm"))
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
        counted.append((batch["input_ids"].shape[1], linear, cache))
    (length, few, cache), (all_length, every, all_cache) = counted
    assert length == all_length  # placeholders are the same
    short = length - 64 + kept
    assert cache * length == all_cache * short and few * length == every * short


def test_cost_of_what_is_kept() -> None:
    few, all_of_them, unknown = (
        cost(validate(ModelConfig, tiny_values(**composition(selector)), source="test"), (90, 140))
        for selector in (SIMILARITY | {"top_k": 5}, None, SIMILARITY | {"top_p": 0.5})
    )
    assert (few.visual_tokens, all_of_them.visual_tokens) == (16 + 1 + 5, 16 + 1 + 16)
    assert unknown.visual_tokens == all_of_them.visual_tokens and few.flops < all_of_them.flops
    assert [part.what for part in few.parts if part.part == "selector"] == ["similarity, 5 of 16 tokens"]


def test_evaluation_answers_what_generate_does(tmp_path: Path) -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 5})
    path = tmp_path / "picture.png"
    pictures(SIZES[:1])[0].save(path)
    batch = inputs(processor, TEXTS[:1], pictures(SIZES[:1]))
    ids = model.generate(**batch, do_sample=False, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
    said = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert answer(model, processor, "how many shapes", [path], 4) == said
    record = Record("1", (path,), (Turn("user", TEXTS[0]), Turn("assistant", said)))
    assert evaluate(model, processor, [record, record], max_new_tokens=4).average == 1.0


@torch.no_grad()
def test_gates_of_a_mixture_are_there_to_see() -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 5})
    gate = model.model.multi_modal_projector["overview"].gate
    torch.nn.init.normal_(gate)
    batch = batch_of(processor)
    gates = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)["gates"]
    assert list(gates) == ["overview"] and gates["overview"].shape == (4, 16, 2)  # a row for each overview's tokens
    torch.testing.assert_close(gates["overview"].sum(-1), torch.ones(4, 16), atol=1e-5, rtol=0)
    assert gates["overview"].std() > 0.1
    gate.zero_()
    gates = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)["gates"]
    torch.testing.assert_close(gates["overview"], torch.full((4, 16, 2), 0.5), atol=1e-5, rtol=0)


@torch.no_grad()
def test_decoding_by_hand_goes_on_with_the_mask_that_was_returned() -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 5})
    batch = inputs(processor, TEXTS[:1], pictures(SIZES[:1]))
    first = model(**batch, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    mask = torch.cat([first.attention_mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
    at = mask.sum(1, keepdim=True) - 1
    second = model(input_ids=token, attention_mask=mask, position_ids=at, past_key_values=first.past_key_values).logits
    ids = torch.cat([batch["input_ids"], token], dim=1)
    plain = torch.ones_like(ids)
    whole = model(**{**batch, "input_ids": ids, "attention_mask": plain}).logits
    torch.testing.assert_close(second[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_every_parameter_learns(reduce: str) -> None:
    changes = composition(SIMILARITY | {"top_k": 5, "reduce": reduce})
    overview = {**changes["branches"]["overview"], "adapter": {"type": "gated_mixture", "num_heads": 2}}
    model, processor = tiny_model(**{**changes, "branches": {**changes["branches"], "overview": overview}})
    model.train()
    batch = batch_of(processor)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name in ("adapters", "mixers"):
        for parameter_name, parameter in parameter_groups(model)[name]:
            assert parameter.grad is not None and parameter.grad.any(), parameter_name
    assert {"model.selector.log_temperature", "model.selector.text_proj.weight"} <= {
        name for name, _ in parameter_groups(model)["adapters"]
    }
    assert learning_rates(model, {"adapters": 1e-3}) == {"adapters": 1e-3}


def test_gradient_goes_straight_through_the_choice() -> None:
    """What is kept is as it was; scores get the gradient that they would have if tokens faded with them."""
    torch.manual_seed(0)
    selector = SELECTORS["similarity"](top_k=2, noise=0.0, soft=0.0, places=False).build(4).train()
    tokens, text, wanted = torch.randn(6, 4), torch.randn(3, 4), torch.randn(6, 4)
    selection = selector(tokens, text, torch.rand(6, 2))
    assert torch.equal(selection.tokens, tokens)
    scores = selector.scores(tokens, text).detach().requires_grad_()
    ordered = scores.detach().sort(descending=True)
    assert sorted(selection.keep.nonzero()[:, 0].tolist()) == sorted(ordered.indices[:2].tolist())
    gates = (scores - (ordered.values[1] + ordered.values[2]) / 2).sigmoid()
    ((tokens.mean(0) + gates[:, None] * (tokens - tokens.mean(0))) * wanted).sum().backward()
    (selection.tokens * wanted).sum().backward()
    found = selector.log_temperature.grad
    assert scores.grad is not None and found is not None and found.abs() > 0
    torch.testing.assert_close(found, -(scores.grad * scores.detach()).sum())


def test_noise_in_training_tries_other_tokens() -> None:
    selector = SELECTORS["similarity"](top_k=3).build(8)
    tokens, text = torch.randn(40, 8), torch.randn(2, 8)
    kept = {tuple(selector.eval()(tokens, text, torch.rand(40, 2)).keep.nonzero()[:, 0].tolist()) for _ in range(5)}
    tried = {tuple(selector.train()(tokens, text, torch.rand(40, 2)).keep.nonzero()[:, 0].tolist()) for _ in range(20)}
    assert len(kept) == 1 and len(tried) > 5
    quiet = SELECTORS["similarity"](top_k=3, noise=0.0, soft=0.0).build(8).train()
    assert len({tuple(quiet(tokens, text, torch.rand(40, 2)).keep.tolist()) for _ in range(5)}) == 1


@pytest.mark.parametrize("name", list(SLICING))
def test_every_token_has_a_place(name: str) -> None:
    plan = SLICING[name]().plan((500, 900))
    found, local = places(plan), torch.tensor(plan.local_tokens)
    assert found.shape == (plan.num_tokens, 2) and len(local) == plan.num_tokens
    assert ((found >= 0) & (found <= 1)).all()
    if local.any():  # slices cover the picture evenly, whatever order their tokens are in
        torch.testing.assert_close(found[local].mean(0), torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)


def test_places_of_tiles_and_of_slices_one_by_one() -> None:
    tiles = SLICING["slime"](tile_size=64, tokens_per_tile=4, tokens_per_overview=1).plan((64, 128))
    down, across = places(tiles)[torch.tensor(tiles.local_tokens)].T
    assert tiles.grid == (1, 2)
    assert down.tolist() == [0.25] * 4 + [0.75] * 4 and across.tolist() == [0.125, 0.375, 0.625, 0.875] * 2
    slices = SLICING["uhd"](scale_resolution=64, patch_size=16, tokens_per_view=4).plan((64, 128))
    down, across = places(slices)[torch.tensor(slices.local_tokens)].T
    assert slices.grid == (1, 2)
    assert down.tolist() == [0.5] * 8 and across.tolist() == [
        0.0625,
        0.1875,
        0.3125,
        0.4375,
        0.5625,
        0.6875,
        0.8125,
        0.9375,
    ]


@torch.no_grad()
def test_a_place_is_added_to_what_is_kept() -> None:
    selector = SELECTORS["similarity"](top_k=2).build(6).eval()
    tokens, text, where = torch.randn(5, 6), torch.randn(2, 6), torch.rand(5, 2)
    assert torch.equal(selector(tokens, text, where).tokens, tokens)  # nothing at first
    torch.nn.init.normal_(selector.places.proj.weight)
    moved = selector(tokens, text, where)
    assert not torch.equal(moved.tokens, tokens)
    assert torch.equal(moved.keep, selector(tokens, text, where.flip(0)).keep)  # where it lies does not choose
    assert SELECTORS["similarity"](top_k=2, places=False).build(6).places is None


@pytest.mark.parametrize("budget", [{"top_k": 3}, {"top_p": 0.5}])
def test_in_some_of_trainings_images_tokens_fade(budget: dict[str, Any]) -> None:
    """None is dropped there, so that a gradient reaches what would have been, too."""
    torch.manual_seed(1)
    tokens, text, where = torch.randn(12, 8), torch.randn(2, 8), torch.rand(12, 2)
    selector = SELECTORS["similarity"](**budget, noise=0.0, soft=1.0, places=False).build(8).train()
    with torch.no_grad():
        kept = selector.eval()(tokens, text, where).keep
    selection = selector.train()(tokens, text, where)
    assert selection.keep.all() and 0 < kept.sum() < 12
    common = tokens.mean(0)
    shares = (selection.tokens - common).norm(dim=1) / (tokens - common).norm(dim=1)
    assert shares[kept].min() > 0.5 > shares[~kept].max()
    missed = (~kept).nonzero()[0, 0]
    (selection.tokens[missed] * (tokens[missed] - common)).sum().backward()
    assert selector.token_proj.weight.grad.abs().max() > 0


def test_random_draws_anew_and_as_many() -> None:
    selector = SELECTORS["random"](top_k=7).build(8)
    drawn = torch.stack([selector(torch.randn(28, 8), torch.empty(0, 8), torch.rand(28, 2)).keep for _ in range(400)])
    assert (drawn.sum(1) == 7).all() and ((drawn.float().mean(0) - 0.25).abs() < 0.1).all()
    assert selector(torch.randn(3, 8), torch.empty(0, 8), torch.rand(3, 2)).keep.all()


def test_the_nucleus_is_the_fewest_that_hold_the_share() -> None:
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert nucleus(shares, 0.65, 1).tolist() == [False, True, False, True]
    assert nucleus(shares, 0.75, 1).tolist() == [False, True, True, True]
    assert nucleus(shares, 0.1, 3).tolist() == [False, True, True, True]
    assert nucleus(shares, 1.0, 1).all()


def test_a_token_is_like_its_nearest_word() -> None:
    tokens, text = torch.randn(5, 6), torch.randn(3, 6)
    pairs = F.cosine_similarity(tokens[:, None], text[None], dim=-1)
    torch.testing.assert_close(cosine_max(tokens, text), pairs.amax(1))


def test_the_question_is_the_users_turns() -> None:
    tokenizer = tiny_tokenizer()
    turns = turns_of(tokenizer, tokenizer.chat_template)
    said = [("user", "read label"), ("assistant", "4 7 2"), ("user", "how many shapes"), ("assistant", "3")]
    messages = [{"role": role, "content": text} for role, text in said]
    encoded = tokenizer.apply_chat_template(messages[:2], return_dict=True, return_tensors="pt")
    longer = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")

    def marked(ids: torch.Tensor) -> str:
        return tokenizer.decode(ids[0][question_mask(ids, turns)[0]])

    assert marked(encoded["input_ids"]).split() == ["read", "label"]
    assert marked(longer["input_ids"]).split() == ["read", "label", "how", "many", "shapes"]
    plain = tokenizer("read label", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert question_mask(plain, turns).all()  # no turns at all: everything is asked


@torch.no_grad()
def test_answers_do_not_choose() -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 4})
    image = pictures(SIZES[:1])
    kept = []
    for said in ("red", "blue", "4 7 2"):
        messages = [message(Turn("user", "<image>read label")), message(Turn("assistant", said))]
        text = render(processor, messages)
        batch = dict(processor(text=[text], images=image, add_special_tokens=False, return_tensors="pt"))
        length = (batch["input_ids"] == processor.image_token_id)[0].nonzero().max() + 1
        kept.append(model(**batch).attention_mask[0, :length].tolist())
    assert kept[0] == kept[1] == kept[2]
    questions = ("where is star", "which texture", "size of blob", "how many shapes")
    masks = [model(**inputs(processor, [f"<image>{q}"], image)).attention_mask[0, :length].tolist() for q in questions]
    assert any(mask != kept[0] for mask in masks)  # while the question does


@torch.no_grad()
def test_a_prompt_without_a_question_is_refused() -> None:
    model, processor = tiny(SIMILARITY | {"top_k": 4})
    batch = inputs(processor, ["<image>"], pictures(SIZES[:1]))
    with pytest.raises(ValueError, match=r"prompt 0 of the batch has no text that its selector could read"):
        model(**batch)
    batch = inputs(processor, ["<image>read label"], pictures(SIZES[:1]))
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(**batch, inputs_embeds=embeds)
    random, _ = tiny({"type": "random", "top_k": 4})
    assert random(**inputs(processor, ["<image>"], pictures(SIZES[:1]))).attention_mask.sum() < 40


def test_a_template_without_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"has no chat template: give language_model\.chat_template, or set the sel"):
        turns_of(tokenizer, None)
    plain = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"
    with pytest.raises(ValueError, match="cannot be told by its tokens"):
        turns_of(tokenizer, plain)


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ({"type": "similarity"}, "top_k None and top_p None of similarity; give one of them"),
        ({"type": "similarity", "top_k": 3, "top_p": 0.5}, "top_k 3 and top_p 0.5 of similarity; give one of them"),
        ({"type": "similarity", "top_p": 1.5}, "top_p 1.5 of similarity; must be above 0 and up to 1"),
        ({"type": "similarity", "top_k": 0}, "top_k 0 of similarity; must be at least 1"),
        ({"type": "similarity", "top_k": 4, "reduce": "sum"}, "reduce"),
        ({"type": "similarity", "top_k": 4, "min_tokens": 2}, "min_tokens 2 of similarity; goes with top_p"),
        (
            {"type": "similarity", "top_p": 0.5, "min_tokens": 0},
            "min_tokens 0 of similarity; goes with top_p, and must",
        ),
        ({"type": "similarity", "top_k": 4, "soft": 2}, "soft 2.0 of similarity; is a share, from 0 to 1"),
        ({"type": "published", "temperature": 0}, "temperature 0.0 of published; must be above 0"),
        ({"type": "simularity", "top_k": 4}, "did you mean 'similarity'?"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(selector: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(ModelConfig, tiny_values(**composition(selector)), source="test")
    assert said in str(error.value)


def test_what_a_selector_needs_is_said_before_weights_load() -> None:
    values = tiny_values()
    values["branches"]["selector"] = SIMILARITY | {"top_k": 4}
    with pytest.raises(ConfigError, match="selector 'similarity' chooses among the tokens of slices, and slicing '"):
        validate(ModelConfig, values, source="test")
    slices = {**SLIME["branches"]["slices"], "mixer": {"type": "channel_concat", "grid": [2, 2]}}
    changes = {**SLIME, "branches": {**SLIME["branches"], "overview": {"mixer": FREE, "adapter": {"type": "mlp"}}}}
    with pytest.raises(ConfigError, match="adapter 'mlp' of branch 'overview' has no projector to share"):
        validate(ModelConfig, tiny_values(**changes), source="test")
    changes = {
        "experts": {**SLIME["experts"], "sam": {"variant": "micro", "pretrained": None}},
        "branches": {**SLIME["branches"], "slices": {**slices, "experts": ["sam"]}},
        "slicing": SLIME["slicing"],
    }
    with pytest.raises(ConfigError, match="it takes 128 channels, and this branch's mixer gives 64"):
        validate(ModelConfig, tiny_values(**changes), source="test")
