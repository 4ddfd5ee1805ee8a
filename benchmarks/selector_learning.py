"""Does the selector learn what a question needs? The miniature with slices, at a quarter of the local tokens.

    python benchmarks/selector_learning.py --seeds 0 1 2 --json results.json

Pictures of 256 pixels, whose small print is lost in the overview; four tiles, 64 local tokens, 16 of them kept. For
each seed, adapters and language model learn dense captions with all tokens; then, from the same weights, talks of
eight questions three ways: `similarity` and `random` with 16 tokens, and `all`. They are tested with one question at a
time. Experts stay frozen, so that what they make of a picture is computed once. Exact match of the whole answer,
predicted with the right answer before it, which is what greedy decoding gives.
"""

import argparse
import copy
import json
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from moe_vision.config import load_config
from moe_vision.data.chat import IGNORED, tokenise
from moe_vision.data.collate import Collator, views_of
from moe_vision.data.records import Record, load_records
from moe_vision.data.synthetic import write_split
from moe_vision.modeling.compose import compose
from moe_vision.modeling.model_config import ModelConfig, packaged_config

LOCAL, KEPT, SPREAD = 64, 16, 2
"""Local tokens of a picture, how many of them are kept, and how many times as large as usual a picture is."""

WAYS = {
    "similarity": f"{{type: similarity, top_k: {KEPT}}}",
    "random": f"{{type: random, top_k: {KEPT}}}",
    "all": f"{{type: similarity, top_k: {LOCAL}}}",
}
CAPTIONS = {"epochs": 4, "batch_size": 8, "adapters": 4e-3, "language_model": 5e-4}
QUESTIONS = {"epochs": 6, "batch_size": 8, "adapters": 2e-3, "language_model": 1e-3}


class Fusion:
    """One composed model, and what its frozen experts made of every picture."""

    def __init__(self, way: str, features: dict[Path, torch.Tensor]) -> None:
        config = load_config(
            ModelConfig, packaged_config("model/micro-slices.yaml"), [f"branches.selector={WAYS[way]}"]
        )
        self.model, self.processor = compose(config)
        self.features = features
        self.collator = Collator(self.processor.tokenizer.pad_token_id)

    def batch(self, records: Sequence[Record]) -> dict[str, Any]:
        """Inputs of the model, with mixed tokens in place of pictures."""
        items = []
        for record in records:
            text = tokenise(record, self.processor)
            items.append({"input_ids": text.input_ids, "labels": text.labels})
        side = 128 * SPREAD
        mixed_tokens = torch.cat([self.features[record.images[0]].float() for record in records])
        sizes = torch.tensor([[side, side, 1]] * len(mixed_tokens))
        return {**self.collator(items), "mixed_tokens": mixed_tokens, "image_sizes": sizes}

    def train(self, records: Sequence[Record], stage: dict[str, float]) -> float:
        """Train adapters, selector and language model; returns the last loss."""
        model = self.model.model
        groups: list[tuple[nn.Module | None, float]] = [
            (model.multi_modal_projector, stage["adapters"]),
            (model.selector, stage["adapters"]),
            (model.language_model, stage["language_model"]),
        ]
        self.model.requires_grad_(False)
        for module, _ in groups:
            if module is not None:
                module.requires_grad_(True)
        parameters = [{"params": list(m.parameters()), "lr": rate} for m, rate in groups if m is not None]
        parameters = [group for group in parameters if group["params"]]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        order, size = list(records), int(stage["batch_size"])
        steps = int(stage["epochs"]) * (len(order) // size)

        def share(step: int) -> float:
            return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        self.model.train()
        model.vision_tower.eval()
        loss = torch.zeros(())
        for _ in range(int(stage["epochs"])):
            random.shuffle(order)
            for start in range(0, len(order) - size + 1, size):
                loss = self.model(**self.batch(order[start : start + size])).loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
                optimizer.step()
                schedule.step()
        return loss.item()

    @torch.no_grad()
    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Exact match of answers by task, and their average."""
        self.model.eval()
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(records), 96):
            chunk = records[start : start + 96]
            batch = self.batch(chunk)
            del batch["logits_to_keep"]  # each answer is compared at its own positions
            labels = batch["labels"][:, 1:]
            said = self.model(**batch).logits[:, :-1].argmax(-1)
            for record, answer, found in zip(chunk, labels, said, strict=True):
                learnt = answer != IGNORED
                right[record.task].append(bool((answer[learnt] == found[learnt]).all()))
        scores = {task: sum(values) / len(values) for task, values in right.items()}
        return {**scores, "average": statistics.fmean(scores.values())}


@torch.no_grad()
def encode(paths: Sequence[Path]) -> dict[Path, torch.Tensor]:
    """Mixed tokens [5, 64, C] of every picture: the overview's, then those of four tiles; both branches mix alike."""
    fusion = Fusion("all", {})
    tower = fusion.model.model.vision_tower.eval()
    features = {}
    for path in paths:
        features[path] = tower(views_of((path,), fusion.processor)["pixel_values"]).data.half()
    return features


def run(seed: int, scenes: int, test_scenes: int, ways: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Scores of every way from one seed, which draws pictures, weights and order."""
    train = write_split(folder, "train", scenes, seed, spread=SPREAD)
    test = load_records(write_split(folder, "test", test_scenes, seed, spread=SPREAD)["questions"])
    captions, questions = load_records(train["captions"]), load_records(train["questions"])
    features = encode(sorted({path for record in (*captions, *test) for path in record.images}))
    set_seed(seed)
    first = Fusion("all", features)
    print(f"seed {seed}: captions, loss {first.train(captions, CAPTIONS):.3f}", flush=True)
    state = copy.deepcopy(first.model.state_dict())
    scores = {}
    for way in ways:
        started = time.perf_counter()
        set_seed(seed)
        fusion = Fusion(way, features)
        fusion.model.load_state_dict(state, strict=way != "random")  # which has no projections to score with
        loss = fusion.train(questions, QUESTIONS)
        scores[way] = fusion.score(test)
        shown = " ".join(f"{task} {value:.3f}" for task, value in scores[way].items())
        print(f"seed {seed} {way}: loss {loss:.3f} {shown} ({time.perf_counter() - started:.0f} s)", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--test-scenes", type=int, default=150)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results[seed] = run(seed, arguments.scenes, arguments.test_scenes, arguments.ways, Path(folder))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    tasks = list(next(iter(results[arguments.seeds[0]].values())))
    print("| task | " + " | ".join(arguments.ways) + " |\n|---|" + "---|" * len(arguments.ways))
    for task in tasks:
        cells = []
        for way in arguments.ways:
            values = [results[seed][way][task] for seed in arguments.seeds]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        print(f"| {task} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
