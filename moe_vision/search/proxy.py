"""A set of experts without training: ridge regression from what the experts made of pictures to the answers.

The closed form of a projector that maps [features of the picture] x [words of the question] to answers: with kernels of
both, K = (1 + K_pictures) * K_questions over items, scores are K (K + ridge)^-1 Y, Y the answers as one-hot rows. The
kernels of several experts add up, as their channels would stand side by side, so that each expert's is made once and a
set costs one Cholesky factor. What depth and the language model would add is not in it: it ranks, it does not predict.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    `settings.records` are drawn by the seed; asked: what is asked, by its last question.
    """

    def __init__(
        self, maps: Mapping[str, Maps], train: Sequence[Record], asked: Sequence[Record], settings: Proxy, seed: int
    ) -> None:
        every = [item for item in items_of(train, last_only=False) if item.images]
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
        self.train = [every[row] for row in sorted(order[: settings.records])]
        self.asked, self.settings = items_of(asked, last_only=True), settings
        self.answers = list(dict.fromkeys(item.answer for item in self.train))
        place = {answer: row for row, answer in enumerate(self.answers)}
        rows = torch.tensor([place[item.answer] for item in self.train])
        self.targets = F.one_hot(rows, len(self.answers)).float()
        learnt, questions = question_vectors(self.train, self.asked)
        self.of_questions = learnt @ learnt.T, questions @ learnt.T
        self.of_pictures = {name: self.picture_kernels(found) for name, found in maps.items()}

    def picture_kernels(self, maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's kernels [train, train] and [asked, train], whose mean on the diagonal of train is 1."""
        every = list(dict.fromkeys(item.images for item in (*self.train, *self.asked)))
        place = {images: row for row, images in enumerate(every)}
        vectors = torch.stack([self.vector(maps, images) for images in every])
        learnt, asked = (torch.tensor([place[item.images] for item in items]) for items in (self.train, self.asked))
        known = vectors[learnt.unique()]
        vectors = (vectors - known.mean(0)) / known.std(0).clamp(min=1e-6)
        kernel = vectors @ vectors[: int(learnt.max()) + 1].T
        kernel = kernel / kernel.diagonal()[learnt.unique()].mean()
        return kernel[learnt][:, learnt], kernel[asked][:, learnt]

    def vector(self, maps: Maps, images: tuple[Path, ...]) -> torch.Tensor:
        """What an expert made of the pictures of a prompt, their mean; nothing of none."""
        if not images:
            return torch.zeros_like(self.vector(maps, self.train[0].images))
        return torch.stack([pooled(maps[path], self.settings.grid) for path in images]).mean(0)

    def right(self, experts: Experts) -> list[bool]:
        """Whether ridge regression from these experts answers each item right."""
        between, across = (torch.stack([self.of_pictures[name][side] for name in experts]).mean(0) for side in (0, 1))
        kernel = (1 + between) * self.of_questions[0]
        kernel.diagonal().add_(self.settings.ridge)
        alpha = torch.cholesky_solve(self.targets, torch.linalg.cholesky(kernel))
        said = (((1 + across) * self.of_questions[1]) @ alpha).argmax(1).tolist()
        return [self.answers[row] == item.answer for row, item in zip(said, self.asked, strict=True)]


def pooled(feature_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[C, h, w] → [2 * C * rows * columns]: mean and maximum of each cell of a grid."""
    batch = feature_map[None].float()
    return torch.cat([F.adaptive_avg_pool2d(batch, grid), F.adaptive_max_pool2d(batch, grid)]).flatten()


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
