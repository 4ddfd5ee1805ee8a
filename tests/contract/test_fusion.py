"""Every registered mixer and adapter keeps the contract."""

import pytest
import torch

from moe_vision.fusion import ADAPTERS, MIXERS, Mixer, adapt_grid
from moe_vision.types import FeatureMap, MapShape, TokenShape, VisualTokens

MIXER_SETTINGS = {
    "channel_concat": {"grid": (4, 4)},
    "deformable": {"num_heads": 2, "num_points": 3, "num_levels": 2, "zero_init": False},
    "mr_adapter": {"num_adapters": 2, "zero_init": False},
    "patch_mining": {"base": "b", "zero_init": False},
    "sequence_append": {"hidden_size": 7, "grids": {"a": (4, 4)}},
}
ADAPTER_SETTINGS = {
    "cell": {"num_queries": 4, "num_heads": 5},
    "gated_mixture": {"num_heads": 3, "inner_size": 24},
    "mlp": {"merge": 2, "pool": 2, "norm": "cell", "inner_size": 24, "positions": True},
    "perceiver": {"num_queries": 4, "num_heads": 5},
    "query_compressor": {"num_queries": 4, "num_heads": 3},
    "region_attention": {"side": 2, "attention_size": 6},
}
MAPS = {"a": MapShape(6, (8, 8)), "b": MapShape(10, (4, 4)), "c": MapShape(2, (4, 8))}
TOKENS = TokenShape(16, 12, (4, 4))


def maps(views: int) -> dict[str, FeatureMap]:
    return {
        name: FeatureMap(torch.randn(views, shape.channels, *shape.grid).requires_grad_())
        for name, shape in MAPS.items()
    }


def mixed(mixer: Mixer, inputs: dict[str, FeatureMap]) -> VisualTokens:
    """What a mixer makes of maps; one that speaks between the blocks of its base does so behind each of three."""
    if mixer.injected is not None:
        base, inject = inputs[mixer.injected].data, mixer.injection(inputs)
        for done in (1, 2, 3):
            base = inject(done, 3, base)
        inputs = {**inputs, mixer.injected: FeatureMap(base)}
    return mixer(inputs)


def test_every_registered_class_has_settings_here() -> None:
    assert set(MIXER_SETTINGS) == set(MIXERS) and set(ADAPTER_SETTINGS) == set(ADAPTERS)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_mixers(name: str) -> None:
    torch.manual_seed(0)
    config = MIXERS[name](**MIXER_SETTINGS[name])
    mixer, inputs = config.build(MAPS), maps(3)
    tokens = mixed(mixer, inputs)
    assert tokens.shape == config.shape(MAPS)
    tokens.data.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mixer.parameters())
    alone = mixed(mixer, {key: FeatureMap(value.data[1:2]) for key, value in inputs.items()})
    torch.testing.assert_close(tokens.data[1:2], alone.data)
    plain = config.to_dict()
    assert MIXERS[plain.pop("type")](**plain) == config


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapters(name: str) -> None:
    torch.manual_seed(0)
    config = ADAPTERS[name](**ADAPTER_SETTINGS[name])
    adapter = config.build(TOKENS, 20)
    tokens = VisualTokens(torch.randn(3, TOKENS.num_tokens, TOKENS.channels), TOKENS.grid)
    out = adapter(tokens)
    assert out.shape == config.shape(TOKENS, 20)
    out.data.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    adapter.eval()  # without the noise of training
    alone = adapter(VisualTokens(tokens.data[1:2], TOKENS.grid))
    torch.testing.assert_close(adapter(tokens).data[1:2], alone.data)
    plain = config.to_dict()
    assert ADAPTERS[plain.pop("type")](**plain) == config


def test_concat_of_one_expert_is_that_expert() -> None:
    feature_map = FeatureMap(torch.randn(2, 5, 4, 4))
    config = MIXERS["channel_concat"](grid=(4, 4))
    tokens = config.build({"only": feature_map.shape})({"only": feature_map})
    assert torch.equal(tokens.data.transpose(1, 2).unflatten(2, (4, 4)), feature_map.data)


def test_concat_keeps_the_order_and_rows() -> None:
    a, b = torch.zeros(1, 1, 2, 2), torch.arange(4.0).view(1, 1, 2, 2)
    config = MIXERS["channel_concat"](grid=(2, 2))
    tokens = config.build({"a": MapShape(1, (2, 2)), "b": MapShape(1, (2, 2))})(
        {"a": FeatureMap(a), "b": FeatureMap(b)}
    )
    assert tokens.data[0].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_pixel_unshuffle_stacks_the_block_of_a_cell() -> None:
    data = torch.arange(16.0).view(1, 1, 4, 4)
    assert adapt_grid(data, (2, 2), "pixel_unshuffle")[0, :, 0, 0].tolist() == [0, 1, 4, 5]


def test_pool_averages_the_block_of_a_cell() -> None:
    data = torch.arange(16.0).view(1, 1, 4, 4)
    assert adapt_grid(data, (2, 2), "pool")[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    config = MIXERS["channel_concat"](grid=(4, 4), resample={"a": "pool"})
    assert config.shape(MAPS).channels == sum(shape.channels for shape in MAPS.values())
    assert config.build(MAPS)(maps(2)).shape == config.shape(MAPS)


@pytest.mark.parametrize("method", ["pixel_unshuffle", "pool"])
def test_maps_of_another_size_than_promised_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=rf"{method} cannot bring a grid of \[6, 4\] to \[4, 4\]"):
        adapt_grid(torch.zeros(1, 2, 6, 4), (4, 4), method)


def test_a_grid_that_does_not_nest_names_those_that_do() -> None:
    config = MIXERS["channel_concat"](grid=(3, 3), resample={"a": "pixel_unshuffle"})
    with pytest.raises(ValueError, match=r"expert 'a'.*\[8, 8\] to \[3, 3\].*\[4, 4\]"):
        config.build(MAPS)


def test_mlp_pools_what_it_projects() -> None:
    config = ADAPTERS["mlp"](depth=1, pool=2)
    adapter = config.build(TokenShape(4, 3, (2, 2)), 5)
    data = torch.randn(1, 4, 3)
    pooled = adapter(VisualTokens(data, (2, 2))).data
    torch.testing.assert_close(pooled[:, 0], adapter.layers(data).mean(1))
