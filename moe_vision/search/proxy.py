"""A set of experts without training: ridge regression from what the experts made of pictures to the answers.

The closed form of a projector that maps [what stands together in a cell of the picture] x [words of the question] to
the tokens of the answer. With kernels of both, K = (1 + K_pictures) * K_questions over items, scores are
K (K + ridge)^-1 Y, Y the answer's tokens as one-hot rows, one after the other.

A picture is the sum over its cells of the outer product of two experts' channels (bilinear pooling, Lin et al., arXiv
1504.07889): sums of channels alone lose what lies in the same place, and a cell's own channels ask for far more
pictures than there are. The kernel of a set is the mean of those of its pairs of experts, so that each pair's is made
once and a set costs one Cholesky factor. What depth and the language model add is not in it: it ranks, it does not
predict.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from moe_vision.data.records import IMAGE_MARKER, Record
from moe_vision.search.config import Proxy
from moe_vision.search.methods import Experts
from moe_vision.training.features import Maps


@dataclass(frozen=True)
class Item:
    """A question about pictures, and its answer."""

    images: tuple[Path, ...]
    question: str
    answer: str


def items_of(records: Sequence[Record], last_only: bool) -> list[Item]:
    """Every question of records with its answer, or the last of each, which is what evaluation asks."""
    found = []
    for record in records:
        pairs = [
            Item(record.images, before.text.replace(IMAGE_MARKER, " "), turn.text.strip())
            for before, turn in zip(record.turns, record.turns[1:], strict=False)
            if turn.role == "assistant"
        ]
        found += pairs[-1:] if last_only else pairs
    return found


class RidgeProxy:
    """Right or wrong for every validation item, for any set of experts whose maps are there.

    maps: [C, h, w] by expert and picture, of all pictures of both; train: what it learns from, of whose questions
    `settings.records` are drawn by the seed; asked: what is asked, by its last question; tokenise: of an answer;
    device: that computes, the CPU if null.
    """

    def __init__(
        self, maps: Mapping[str, Maps], train: Sequence[Record], asked: Sequence[Record], settings: Proxy, seed: int,
        tokenise: Callable[[str], list[int]], device: torch.device | None = None,
    ) -> None:  # fmt: skip
        every = [item for item in items_of(train, last_only=False) if item.images]
        if not every:
            raise ValueError("proxy ridge learns from questions about pictures, and the last stage's data has none")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
        learnt, questions = [every[row] for row in sorted(order[: settings.records])], items_of(asked, last_only=True)
        self.settings, self.device = settings, device
        prompts = list(dict.fromkeys(item.images for item in (*learnt, *questions)))
        place = {images: row for row, images in enumerate(prompts)}
        self.learnt, self.asked = (
            torch.tensor([place[item.images] for item in items], device=device) for items in (learnt, questions)
        )
        self.targets, self.wanted = (made.to(device) for made in answer_tokens(learnt, questions, tokenise))
        of_learnt, of_asked = (made.to(device) for made in question_vectors(learnt, questions))
        self.of_questions = of_learnt @ of_learnt.T, of_asked @ of_learnt.T
        self.cells = {name: self.cells_of(own, prompts) for name, own in maps.items()}
        self.of_pairs: dict[tuple[str, str], torch.Tensor] = {}

    def cells_of(self, maps: Maps, prompts: Sequence[tuple[Path, ...]]) -> torch.Tensor:
        """[prompts, cells, channels] of one expert: standardised, on the grid, in at most `settings.channels` principal
        components; the mean over the pictures of a prompt, nothing where it has none."""
        rows, columns = self.settings.grid
        size = {path: on_grid(maps[path].to(self.device), (rows, columns)) for images in prompts for path in images}
        none = torch.zeros_like(next(iter(size.values())))
        cells = torch.stack([torch.stack([size[p] for p in images]).mean(0) if images else none for images in prompts])
        known = cells[self.learnt.unique()].flatten(0, 1)
        cells = (cells - known.mean(0)) / known.std(0).clamp(min=1e-6)
        if cells.shape[-1] > self.settings.channels:
            known = cells[self.learnt.unique()].flatten(0, 1)
            _, vectors = torch.linalg.eigh(known.T @ known)
            cells = cells @ vectors[:, -self.settings.channels :]
        return cells

    def of_pair(self, first: str, second: str) -> torch.Tensor:
        """The kernel [prompts, prompts] of two experts, whose mean on the diagonal of what is learnt from is 1."""
        if (first, second) not in self.of_pairs:
            products = torch.einsum("pnc,pnk->pck", self.cells[first], self.cells[second]).flatten(1)
            known = self.learnt.unique()
            products = products - products[known].mean(0)
            kernel = products @ products.T
            self.of_pairs[first, second] = kernel / kernel.diagonal()[known].mean().clamp(min=1e-12)
        return self.of_pairs[first, second]

    def right(self, experts: Experts) -> list[bool]:
        """Whether ridge regression from these experts answers each item right, in all its tokens."""
        pairs = [self.of_pair(*sorted(pair)) for pair in product(experts, repeat=2)]
        pictures = 1 + torch.stack(pairs).mean(0)
        kernel = pictures[self.learnt][:, self.learnt] * self.of_questions[0]
        kernel.diagonal().add_(self.settings.ridge)
        alpha = torch.cholesky_solve(self.targets.flatten(1), torch.linalg.cholesky(kernel))
        scores = (pictures[self.asked][:, self.learnt] * self.of_questions[1]) @ alpha
        said = scores.view(len(self.asked), *self.targets.shape[1:]).argmax(2)
        right: list[bool] = (said == self.wanted).all(1).tolist()
        return right


def answer_tokens(
    learnt: Sequence[Item], asked: Sequence[Item], tokenise: Callable[[str], list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot answers [items, places, words] of what is learnt from, and words [items, places] of what is asked: place
    for place, with an end after the last. A word that was never learnt is -1."""
    answers = [[[*map(str, tokenise(item.answer)), "end"] for item in items] for items in (learnt, asked)]
    places = max(len(answer) for answer in answers[0])
    column = {word: row for row, word in enumerate(dict.fromkeys(word for answer in answers[0] for word in answer))}
    wanted = [
        torch.tensor([[column.get(w, -1) for w in [*a[:places], *["end"] * (places - len(a))]] for a in part])
        for part in answers
    ]
    long = torch.tensor([len(answer) > places for answer in answers[1]])
    wanted[1][long] = -1
    return F.one_hot(wanted[0], len(column)).float(), wanted[1]


def on_grid(feature_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[C, h, w] → [rows * columns, C]."""
    resized = F.interpolate(feature_map[None].float(), size=grid, mode="bilinear", antialias=True)[0]
    return resized.flatten(1).T


def question_vectors(train: Sequence[Item], asked: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors [items, words] of the questions of both, rarer words with more weight."""
    bags = [[Counter(item.question.lower().split()) for item in items] for items in (train, asked)]
    seen = Counter(word for bag in bags[0] for word in bag)
    place = {word: column for column, word in enumerate(seen)}
    weight = torch.tensor([len(train) / count for count in seen.values()]).log1p()
    found = []
    for part in bags:
        counts = torch.zeros(len(part), len(place))
        for row, bag in enumerate(part):
            for word, count in bag.items():
                if word in place:
                    counts[row, place[word]] = count
        found.append(F.normalize(counts * weight, dim=1))
    return found[0], found[1]
