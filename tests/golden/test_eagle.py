"""EVA-02's detection backbone against the published implementation: inputs, weights and outputs of NVlabs/Eagle.

Measured: largest difference 8e-6 on outputs up to 8.5, against 1.5e-5 between fp32 and fp64 in the published code.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from moe_vision.experts.eva02 import Eva02Backbone

GOLDEN = Path(__file__).parent / "eagle"


def backbone() -> Eva02Backbone:
    model = Eva02Backbone(
        hidden_size=32, depth=3, num_heads=2, window_size=16, global_blocks=[1], position_grid=14, rope_reference=16,
        patch_size=16,
    )  # fmt: skip
    state = load_file(GOLDEN / "eva_256_weights.safetensors")
    model.load_state_dict({k.removeprefix("vision_tower."): v for k, v in state.items() if "rope" not in k})
    return model.eval()


def test_eva02_equals_the_published_tower() -> None:
    case = load_file(GOLDEN / "eva_256_io.safetensors")
    with torch.no_grad():
        output = backbone()(case["input"])
    torch.testing.assert_close(output, case["output"], atol=2e-4, rtol=1e-3)


def test_the_case_would_notice_other_positions() -> None:
    case = load_file(GOLDEN / "eva_256_io.safetensors")
    model = backbone()
    model.rope_reference = 8
    with torch.no_grad():
        output = model(case["input"])
    assert (output - case["output"]).abs().max() > 1e-2
