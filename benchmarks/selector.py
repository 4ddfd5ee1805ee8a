"""Scores of SliME's selector: all pairs of tokens and words, as its code makes them, against one matrix-vector product.

    python benchmarks/selector.py

Prints times of both and their ratio, measured side by side, and by how much the scores differ.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_vision.fusion.selector import cosine_sum


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=864, help="six tiles of 144")
    parser.add_argument("--words", type=int, default=64, help="a question with its system prompt")
    parser.add_argument("--width", type=int, default=4096, help="of a 7-billion language model")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    count, words, width = arguments.tokens, arguments.words, arguments.width
    tokens, text = torch.randn(count, width), torch.randn(words, width)
    difference = (all_pairs(tokens, text) - cosine_sum(tokens, text)).abs().max().item()
    pairs, product = seconds(lambda: all_pairs(tokens, text), 3), seconds(lambda: cosine_sum(tokens, text), 30)
    print(f"L={count} T={words} D={width}, {torch.get_num_threads()} threads, fp32")
    print(f"all pairs      {pairs * 1e3:10.2f} ms, {4 * count * words * width / 1e9:.2f} GB in one tensor")
    print(f"matrix-vector  {product * 1e3:10.2f} ms")
    print(f"ratio          {pairs / product:10.0f}x, largest difference of scores {difference:.1e}")


if __name__ == "__main__":
    main()
