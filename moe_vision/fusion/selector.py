"""Which of an image's local tokens the language model gets, by the question that is asked of it.

SliME (Zhang et al., 2024) promises such a selector: fewer local tokens, those that matter. `similarity` is what the
paper says, with parameters that learn; `published` is what its code does; `random` drops as many without looking, the
baseline that a selector has to beat.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from moe_vision.registry import SELECTORS


@dataclass(frozen=True)
class Selection:
    """tokens: [L, D], all of them; keep: [L], true for those that the language model gets."""

    tokens: torch.Tensor
    keep: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """What every selector's config has."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    type_name: ClassVar[str] = ""

    @property
    def reads(self) -> Literal["question", "all", "none"]:
        """`question`: the user's turns; `all`: every token of the prompt that stands for no image."""
        raise NotImplementedError(f"{type(self).__name__} must define reads")

    def kept(self, tokens: int) -> int | None:
        """How many of so many local tokens are kept, null where that depends on the picture."""
        raise NotImplementedError(f"{type(self).__name__} must define kept()")

    def build(self, hidden_size: int) -> "Selector":
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the registered name as `type`."""
        return {"type": self.type_name, **asdict(self)}


class Selector(nn.Module):
    """forward: local tokens [L, D] of one image, in their order; text [T, D] as the language model embeds it; places
    [L, 2], where in the image each token lies, down and across, in 0..1.
    """

    def forward(self, tokens: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> Selection:
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


OCTAVES = (0, 1, 2, 3, 4)
"""Waves by which a place is told: half of one over the image, a whole one, two, …"""


def waves(places: torch.Tensor) -> torch.Tensor:
    """Places [L, 2] in 0..1 → sines and cosines of each coordinate, [L, 4 * octaves]."""
    angles = places[:, :, None] * (math.pi * 2.0 ** torch.tensor(OCTAVES, device=places.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Places(nn.Module):
    """A learned embedding of a token's place in the image, zero at first: what is dropped takes along what the order of
    the others said of it. forward: tokens [L, D], places [L, 2] → [L, D].
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * len(OCTAVES), hidden_size, bias=False)
        self.draw_weights()

    def draw_weights(self) -> None:
        init.zeros_(self.proj.weight)

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.proj(waves(places).to(self.proj.weight.dtype))
        return tokens + embedded


def check_budget(name: str, top_k: int | None, top_p: float | None, min_tokens: int | None = None) -> None:
    """Raises ValueError unless exactly one of top_k and top_p is given, and in range; min_tokens goes with top_p."""
    if (top_k is None) == (top_p is None):
        raise ValueError(f"top_k {top_k} and top_p {top_p} of {name}: give one of them, a number of tokens or a share")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} of {name}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} of {name}: must be above 0 and up to 1")
    if min_tokens is not None and (top_k is not None or min_tokens < 1):
        raise ValueError(f"min_tokens {min_tokens} of {name}: goes with top_p, and must be at least 1")


@SELECTORS.register("similarity")
@dataclass(frozen=True, kw_only=True)
class SimilarityConfig(SelectorConfig):
    """Tokens that are alike the question's words, in a space that is learnt.

    top_k: tokens that an image keeps. top_p: in its place, the fewest tokens that hold this share of the softmax over
    all scores, and no fewer than min_tokens, one if null. reduce: a token's score is that of the word that it is most
    like (`max`), or the average over all words (`mean`). projection_size: width of the space. noise: size of the Gumbel
    noise on the scores in training, so that tokens are tried that would not be kept. soft: share of the images in
    training in which no token is dropped, but each fades into the average of all as far as its score is low, so that a
    gradient tells which were missed. places: add to each token a learned embedding of its place in the image. text:
    whose words.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_tokens: int | None = None
    reduce: Literal["mean", "max"] = "max"
    projection_size: int = 256
    noise: float = 1.0
    soft: float = 0.5
    places: bool = True
    text: Literal["question", "all"] = "question"

    def __post_init__(self) -> None:
        check_budget(self.type_name, self.top_k, self.top_p, self.min_tokens)
        if self.projection_size < 1:
            raise ValueError(f"projection_size {self.projection_size} of {self.type_name}: must be at least 1")
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} of {self.type_name}: must be at least 0")
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft {self.soft} of {self.type_name}: is a share, from 0 to 1")

    @property
    def reads(self) -> Literal["question", "all", "none"]:
        return self.text

    def kept(self, tokens: int) -> int | None:
        return kept_of(tokens, self.top_k, self.top_p)

    def build(self, hidden_size: int) -> "Similarity":
        return Similarity(self, hidden_size)


class Similarity(Selector):
    def __init__(self, config: SimilarityConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.token_proj = nn.Linear(hidden_size, config.projection_size, bias=False)
        self.text_proj = nn.Linear(hidden_size, config.projection_size, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.places = Places(hidden_size) if config.places else None
        self.draw_weights()

    def draw_weights(self) -> None:
        # One and the same at first, so that scores begin as the cosine in the language model's own space.
        init.normal_(self.token_proj.weight, std=self.config.projection_size**-0.5)
        init.copy_(self.text_proj.weight, self.token_proj.weight)
        init.constant_(self.log_temperature, math.log(0.1))

    def forward(self, tokens: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> Selection:
        config, scores = self.config, self.scores(tokens, text)
        if self.training and config.noise:
            scores = scores - config.noise * torch.empty_like(scores).exponential_().log()
        ranked = scores.detach()
        if config.top_k is not None:
            keep = best(ranked, config.top_k)
        else:
            assert config.top_p is not None
            keep = nucleus(ranked.softmax(-1), config.top_p, config.min_tokens or 1)
        told = tokens
        if torch.is_grad_enabled() and not bool(keep.all()):
            gates = soft_gates(scores, keep)
            if self.training and torch.rand(()) < config.soft:
                told, keep = faded(tokens, gates), torch.ones_like(keep)
            else:
                told = straight_through(tokens, gates)
        return Selection(told if self.places is None else self.places(told, places), keep)

    def scores(self, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """How alike each token [L, D] is to the words [T, D], over the temperature: [L]."""
        seen, asked = self.token_proj(tokens), self.text_proj(text)
        alike = cosine_mean(seen, asked) if self.config.reduce == "mean" else cosine_max(seen, asked)
        return alike / self.log_temperature.exp()


def soft_gates(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """How far each token is on the kept side, in 0..1: [L]. One half lies midway between the lowest score [L] that is
    kept and the highest that is not."""
    edge = (scores[keep].min() + scores[~keep].max()).detach() / 2
    return (scores - edge).sigmoid()


def faded(tokens: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Tokens [L, D], each faded into the average of all as far as its gate [L] is shut."""
    return torch.lerp(tokens.mean(0), tokens, gates[:, None])


def straight_through(tokens: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Tokens [L, D] as they are, with the gradient to the gates [L] that `faded` would have."""
    own = (tokens - tokens.mean(0)).detach()
    return tokens + (gates - gates.detach())[:, None] * own


@SELECTORS.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomConfig(SelectorConfig):
    """top_k tokens of each image, drawn anew on every call: what a selector that looks has to beat at equal count.

    places: as `similarity` has it.
    """

    top_k: int
    places: bool = True

    def __post_init__(self) -> None:
        check_budget(self.type_name, self.top_k, None)

    @property
    def reads(self) -> Literal["question", "all", "none"]:
        return "none"

    def kept(self, tokens: int) -> int | None:
        return kept_of(tokens, self.top_k, None)

    def build(self, hidden_size: int) -> "RandomSelector":
        return RandomSelector(self, hidden_size)


class RandomSelector(Selector):
    def __init__(self, config: RandomConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.places = Places(hidden_size) if config.places else None

    def forward(self, tokens: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> Selection:
        keep = best(torch.rand(len(tokens), device=tokens.device), self.config.top_k)
        return Selection(tokens if self.places is None else self.places(tokens, places), keep)


@SELECTORS.register("published")
@dataclass(frozen=True, kw_only=True)
class PublishedConfig(SelectorConfig):
    """SliME's own (yfzhang114/SliME, multimodal_resampler/builder.py), for its checkpoints: it has no parameter, gets
    no gradient, and reads the whole prompt, in training answers included.

    top_p, temperature: as `mm_resampler_topp` and `mm_resampler_temp`. reduce: a token's score is the sum over the text
    (`mean` is what the code does without a mask), so that longer prompts keep fewer. double_softmax: as before
    2024-11-08, when the paper and its checkpoints came out: nearly all tokens weigh alike then, and about top_p of them
    are kept whatever the text.
    """

    top_p: float = 0.95
    temperature: float = 1.0
    reduce: Literal["sum", "mean"] = "sum"
    double_softmax: bool = False

    def __post_init__(self) -> None:
        check_budget(self.type_name, None, self.top_p)
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} of {self.type_name}: must be above 0")

    @property
    def reads(self) -> Literal["question", "all", "none"]:
        return "all"

    def kept(self, tokens: int) -> int | None:
        return kept_of(tokens, None, self.top_p)

    def build(self, hidden_size: int) -> "PublishedSelector":
        return PublishedSelector(self)


class PublishedSelector(Selector):
    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> Selection:
        scores = cosine_sum(tokens, text) if self.config.reduce == "sum" else cosine_mean(tokens, text)
        if self.config.double_softmax:
            scores = (scores / 0.5).softmax(-1)
        if self.training:
            scores = scores + 0.1 * torch.randn_like(scores)
        return Selection(tokens, published_nucleus((scores / self.config.temperature).softmax(-1), self.config.top_p))


def kept_of(tokens: int, top_k: int | None, top_p: float | None) -> int | None:
    """How many of so many tokens a budget keeps, null where that depends on the scores."""
    if top_k is not None:
        return min(top_k, tokens)
    return tokens if top_p == 1 else None


def cosine_sum(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Sum over the words [T, D] of the cosine with each token [L, D]: [L].

    The published code makes a tensor [L, T, D] of all pairs; a sum of products with one vector is the product with the
    sum of vectors.
    """
    lengths = torch.linalg.vector_norm(tokens, dim=-1).clamp(min=1e-12)
    return (tokens @ F.normalize(text, dim=-1).sum(0)) / lengths


def cosine_mean(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """As `cosine_sum`, averaged over the words."""
    return cosine_sum(tokens, text) / len(text)


def cosine_max(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine of each token [L, D] with the word [T, D] that it is most like: [L]."""
    return (F.normalize(tokens, dim=-1) @ F.normalize(text, dim=-1).T).amax(-1)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[L] → [L], true for the `count` highest."""
    index = scores.topk(min(count, len(scores))).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, index, True)


def nucleus(shares: torch.Tensor, top_p: float, min_tokens: int) -> torch.Tensor:
    """[L] summing to one → [L], true for the fewest that hold `top_p` of it, and no fewer than `min_tokens`."""
    if top_p >= 1:
        return torch.ones_like(shares, dtype=torch.bool)
    ordered = shares.sort(descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    wanted = (before < top_p) | (torch.arange(len(shares), device=shares.device) < min_tokens)
    return torch.zeros_like(wanted).scatter(0, ordered.indices, wanted)


def published_nucleus(shares: torch.Tensor, top_p: float) -> torch.Tensor:
    """As `nucleus`, counted as the published code does: those whose running sum is not above `top_p`, and one more.

    At 1 it keeps all, where the published sum drops some when rounding carries it above 1.
    """
    if top_p >= 1:
        return torch.ones_like(shares, dtype=torch.bool)
    ordered = shares.sort(descending=True)
    count = (ordered.values.cumsum(-1) <= top_p).sum() + 1
    wanted = torch.arange(len(shares), device=shares.device) < count
    return torch.zeros_like(wanted).scatter(0, ordered.indices, wanted)
