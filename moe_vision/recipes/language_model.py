"""Pre-train the miniature language model from nothing, on scenes as symbols.

Without it a language model this small does not learn to look things up in the few minutes of a user's own training.
"""

import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_vision.data.synthetic import TASKS, Scene, caption, make_scene, questions, scene_seed
from moe_vision.data.synthetic.questions import CAPTION_PROMPT
from moe_vision.data.synthetic.scene import BARS, COLOURS, SHAPES, TEXTURES
from moe_vision.recipes.symbols import FactTable, scene_facts
from moe_vision.recipes.tokenizer import build_tokenizer

WORDS = (
    *COLOURS, *SHAPES, *TEXTURES, *BARS, "a", "b", "c", "d",
    "read", "label", "how", "many", "shapes", "colour", "of", "where", "is", "beside", "over", "left", "right",
    "above", "below", "value", "bar", "bars", "which", "texture", "size", "blob", "describe", "empty",
)  # fmt: skip
CELLS = 16
STEPS = 3000
IGNORED = -100


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation whose image marker is already repeated once per cell."""
    messages: list[dict[str, Any]] = []
    for i, (question, answer) in enumerate(pairs):
        marker = "<image>" * CELLS if i == 0 else ""
        messages += [{"role": "user", "content": marker + question}, {"role": "assistant", "content": answer}]
    encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if wanted else IGNORED for token, wanted in zip(ids, mask, strict=True)]


def conversation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """What the language model practises on one scene: its caption, or a few of its questions."""
    if rng.random() < 0.3:
        return [(CAPTION_PROMPT, caption(scene))]
    pairs = [(pair.question, pair.answer) for pair in questions(scene, rng)]
    rng.shuffle(pairs)
    return pairs[: rng.choice((1, 4, 8, 8))]


def batch(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels [B, T]; causal attention never looks at padding on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (length - len(row)) for _, row in rows])
    return ids, labels


def logits_of(model: LlamaForCausalLM, prefix: torch.Tensor, ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Logits [B, T, vocabulary] with cell vectors [B, 16, D] on the image tokens of ids [B, T]."""
    embedded = model.get_input_embeddings()(ids)
    mask = (ids == image_token_id).unsqueeze(-1)
    return model(inputs_embeds=embedded.masked_scatter(mask, prefix.to(embedded.dtype))).logits


def pretrain(
    output: Path, *, steps: int = STEPS, batch_size: int = 48, seed: int = 0, log_every: int = 100
) -> dict[str, Any]:
    """Train, save as a Hugging Face folder in fp16 with its tokenizer, and return the metrics."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(WORDS)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model, table = LlamaForCausalLM(config), FactTable(config.hidden_size)
    image_token_id: Any = tokenizer.convert_tokens_to_ids("<image>")
    parameters = [*model.parameters(), *table.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(steps):
        seeds = [scene_seed("train", rng.randrange(100_000), 10 + rng.randrange(10)) for _ in range(batch_size)]
        scenes = [make_scene(number) for number in seeds]
        ids, labels = batch([encode(tokenizer, conversation(s, rng)) for s in scenes], tokenizer.pad_token_id)
        prefix = table(torch.stack([scene_facts(scene) for scene in scenes]))
        # A projector is never exact: practise on cell vectors that are off a little.
        prefix = prefix + 0.15 * prefix.detach().std() * torch.randn_like(prefix) * rng.choice((0, 1, 2))
        logits = logits_of(model, prefix, ids, image_token_id)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % log_every == 0 or step == steps - 1:
            elapsed = time.perf_counter() - started
            print(f"language_model step {step} loss {loss.item():.3f} {elapsed:.0f} s", flush=True)
        if step % 1000 == 999:
            print(accuracy(model, table, tokenizer, num_scenes=100), flush=True)
    metrics = accuracy(model, table, tokenizer, num_scenes=300)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {"seed": seed, "steps": steps, "parameters": model.num_parameters(), "symbolic_accuracy": metrics}


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, table: FactTable, tokenizer: PreTrainedTokenizerFast, num_scenes: int
) -> dict[str, float]:
    """Share of answers of the validation scenes, all tokens right, per task, on symbols."""
    model.eval()
    image_token_id: Any = tokenizer.convert_tokens_to_ids("<image>")
    scenes = [make_scene(scene_seed("val", index, 10)) for index in range(num_scenes)]
    facts = torch.stack([scene_facts(scene) for scene in scenes])
    asked = [questions(scene) for scene in scenes]
    result = {}
    for number, task in enumerate(TASKS):
        rows = [encode(tokenizer, [(pairs[number].question, pairs[number].answer)]) for pairs in asked]
        ids, labels = batch(rows, tokenizer.pad_token_id)
        best = logits_of(model, table(facts), ids, image_token_id)[:, :-1].argmax(-1)
        right = (best == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
        result[task] = round(right.all(dim=1).float().mean().item(), 3)
    model.train()
    return result | {"average": round(sum(result.values()) / len(result), 3)}
