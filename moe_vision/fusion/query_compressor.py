"""SliME's compression of local tokens (Zhang et al., 2024): a few learned queries attend to a view, then a projector.

After yfzhang114/SliME, multimodal_resampler/sampler.py, as its `post_qformer` is built: one attention at the experts'
own width, without projections before and behind. The published model projects what the queries gathered by the global
view's projector: `projector: overview`.
"""

from dataclasses import dataclass
from typing import Literal

from moe_vision.fusion.base import Adapter
from moe_vision.fusion.mlp import MlpConfig
from moe_vision.fusion.perceiver import Perceiver, PerceiverConfig, ResamplerConfig
from moe_vision.registry import ADAPTERS
from moe_vision.types import TokenShape, VisualTokens


@ADAPTERS.register("query_compressor")
@dataclass(frozen=True, kw_only=True)
class QueryCompressorConfig(ResamplerConfig):
    """As `ResamplerConfig`. projector: `own`, an MLP of `depth` layers, `inner_size` wide between them, the language
    model's if null; `overview`, that of the overview's adapter. half_positions: round the fixed positions to 16 bits,
    as the published code does: for imported checkpoints.
    """

    num_queries: int = 144
    projector: Literal["own", "overview"] = "own"
    depth: int = 2
    inner_size: int | None = None
    half_positions: bool = False

    @property
    def projected_by(self) -> str | None:
        return "overview" if self.projector == "overview" else None

    def projection_channels(self, inputs: TokenShape) -> int | None:
        return inputs.channels if self.projector == "own" else None

    def build(self, inputs: TokenShape, hidden_size: int) -> "QueryCompressor":
        self.shape(inputs, hidden_size)
        return QueryCompressor(self, inputs, hidden_size)


class QueryCompressor(Adapter):
    def __init__(self, config: QueryCompressorConfig, inputs: TokenShape, hidden_size: int) -> None:
        super().__init__()
        self.resampler = resampler(config.num_queries, config.num_heads, inputs.channels, config.half_positions)
        self.projection = None
        if config.projector == "own":
            mlp = MlpConfig(depth=config.depth, inner_size=config.inner_size)
            self.projection = mlp.build(TokenShape(config.num_queries, inputs.channels, None), hidden_size)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """[V, h * w, C] on any grid → [V, num_queries, D], or of the experts' width where another adapter projects."""
        compressed: VisualTokens = self.resampler(tokens)
        return compressed if self.projection is None else self.projection(compressed)


def resampler(num_queries: int, num_heads: int | None, channels: int, half_positions: bool) -> Perceiver:
    """A perceiver at the experts' own width, without projections before and behind."""
    config = PerceiverConfig(num_queries=num_queries, num_heads=num_heads)
    config.check_heads(channels)
    return Perceiver(config, channels, channels, projects=False, half_positions=half_positions)
