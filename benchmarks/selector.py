"""Scores of SliME's selector: all pairs of tokens and words, as its code makes them, against one matrix-vector product.

    python benchmarks/selector.py

Prints times of both and their ratio, measured side by side, and by how much the scores differ.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_vision.fusion.selector import cosine_sum

TOKENS, WORDS, WIDTH = 864, 64, 4096
"""Six tiles of 144 tokens, a question with its system prompt, and the width of a 7-billion language model."""


def all_pairs(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The published scores: a tensor [L, T, D], then its sum over the words."""
    return F.cosine_similarity(tokens[:, None], text[None], dim=-1).sum(-1)


def seconds(run: Callable[[], torch.Tensor], repeats: int) -> float:
    """The least of some runs."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    tokens, text = torch.randn(TOKENS, WIDTH), torch.randn(WORDS, WIDTH)
    difference = (all_pairs(tokens, text) - cosine_sum(tokens, text)).abs().max().item()
    pairs, product = seconds(lambda: all_pairs(tokens, text), 3), seconds(lambda: cosine_sum(tokens, text), 30)
    print(f"L={TOKENS} T={WORDS} D={WIDTH}, {torch.get_num_threads()} threads, fp32")
    print(f"all pairs      {pairs * 1e3:10.2f} ms, {4 * TOKENS * WORDS * WIDTH / 1e9:.2f} GB in one tensor")
    print(f"matrix-vector  {product * 1e3:10.2f} ms")
    print(f"ratio          {pairs / product:10.0f}x, largest difference of scores {difference:.1e}")


if __name__ == "__main__":
    main()
