"""Every registered slicing policy keeps the contract, for any size."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_vision.slicing import SLICING, Crop, Marker, Plan, PlanError, Size, SlicingPolicy
from moe_vision.slicing.pack import pack
from moe_vision.types import TokenShape

POLICIES: dict[str, SlicingPolicy] = {name: SLICING[name]() for name in SLICING}
MAY_REFUSE = {"native", "oryx"}
LONGEST = 20_000
SIZES = st.tuples(st.floats(0, 1), st.floats(-1, 1)).map(lambda pair: of_area_and_shape(*pair))


def of_area_and_shape(area: float, shape: float) -> Size:
    """A size by its area and its aspect ratio of at most 1:200, both on logarithmic scales."""
    side, stretch = LONGEST**area, 200 ** (shape / 2)
    return (clip(side * stretch), clip(side / stretch))


def clip(side: float) -> int:
    return min(max(round(side), 1), LONGEST)


def test_every_policy_of_the_issue_is_registered() -> None:
    assert {"uhd", "tiles", "anyres", "native", "oryx", "slime", "none"} <= set(SLICING)


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(SIZES)
def test_any_size(size: Size) -> None:
    for name, policy in POLICIES.items():
        try:
            plan = policy.plan(size)
        except PlanError as error:
            assert name in MAY_REFUSE, f"{name} refuses {size}"
            assert f"an image of {size[0]}x{size[1]} pixels" in str(error)
            continue
        check_plan(policy, plan, size)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 100_000), st.integers(1, 12))
def test_any_shape_and_several_images_in_a_prompt(height: int, width: int, images: int) -> None:
    for name, policy in POLICIES.items():
        try:
            plan = policy.plan((height, width), images)
        except PlanError:
            assert name in MAY_REFUSE
            continue
        check_plan(policy, plan, (height, width))


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 60), st.integers(2, 24))
def test_any_number_of_slices(size: Size, max_slices: int, patches: int) -> None:
    policy = SLICING["uhd"](max_slices=max_slices, scale_resolution=14 * patches)
    check_plan(policy, policy.plan(size), size)


def check_plan(policy: SlicingPolicy, plan: Plan, size: Size) -> None:
    assert plan.size == size and plan.policy == policy.type_name
    assert all(min(view.size) >= 1 for view in plan.views)
    BUDGETS[policy.type_name](policy, plan)
    check_tiling(plan)
    named = {marker.name for marker in policy.markers()}
    assert {marker.name for marker in markers_of(plan)} <= named
    features = [torch.zeros(s.grid[0] * s.grid[1], 1) for s in plan.segments for _ in s.views]
    packed = pack(plan, features, {name: torch.ones(1) for name in named})
    assert len(packed) == plan.num_tokens == plan.num_visual_tokens + plan.num_marker_tokens
    assert int(packed.sum()) == plan.num_marker_tokens


def markers_of(plan: Plan) -> Iterator[Marker]:
    for piece in plan.pieces:
        if isinstance(piece, Marker):
            yield piece
        elif piece.row_end is not None:
            yield piece.row_end


def check_tiling(plan: Plan) -> None:
    """Slices that are cut out of one picture cover it, each pixel once."""
    by_canvas: dict[object, list[Crop]] = {}
    for view in plan.views:
        if view.role == "slice" and isinstance(view.steps[-1], Crop):
            by_canvas.setdefault(view.steps[:-1], []).append(view.steps[-1])
    for steps, crops in by_canvas.items():
        canvas = steps[-1].size  # type: ignore[index]
        tops, lefts = (sorted({crop.offset[axis] for crop in crops}) for axis in (0, 1))
        height, width = crops[0].size
        assert tops == list(range(0, canvas[0], height)) and lefts == list(range(0, canvas[1], width))
        assert sorted(crop.offset for crop in crops) == [(top, left) for top in tops for left in lefts]
        assert {crop.size for crop in crops} == {(height, width)} and (len(tops), len(lefts)) == plan.grid
        assert (height * len(tops), width * len(lefts)) == canvas


def uhd_budget(policy: SlicingPolicy, plan: Plan) -> None:
    patch, most = policy.patch_size, (policy.scale_resolution // policy.patch_size) ** 2  # type: ignore[attr-defined]
    slices = [view for view in plan.views if view.role == "slice"]
    assert len(slices) <= policy.max_slices and len(plan.views) == len(slices) + 1  # type: ignore[attr-defined]
    for view in plan.views:
        rows, columns = view.size[0] / patch, view.size[1] / patch
        assert rows % 1 == columns % 1 == 0
        assert rows * columns <= most or min(rows, columns) == 1


def tiles_budget(policy: SlicingPolicy, plan: Plan) -> None:
    assert sum(view.role == "slice" for view in plan.views) <= 12 and len(plan.views) <= 13
    assert {view.size for view in plan.views} == {(448, 448)}


def anyres_budget(policy: SlicingPolicy, plan: Plan) -> None:
    assert len(plan.views) <= 37 and {view.size for view in plan.views} == {(384, 384)}
    tokens = [rows * columns for rows, columns in (segment.shape for segment in plan.segments)]
    assert tokens[0] == 729 and all(count <= 9 * 729 * 1.1**2 for count in tokens)


def native_budget(policy: SlicingPolicy, plan: Plan) -> None:
    (view,) = plan.views
    rows, columns = view.size[0] / 28, view.size[1] / 28
    assert view.role == "overview" and rows % 1 == columns % 1 == 0
    assert view.size[0] * view.size[1] <= policy.max_pixels or min(rows, columns) == 1  # type: ignore[attr-defined]


def oryx_budget(policy: SlicingPolicy, plan: Plan) -> None:
    overview, whole = plan.views
    assert (overview.role, whole.role) == ("overview", "slice")
    assert all(side % 32 == 0 for view in plan.views for side in view.size)
    assert whole.size[0] * whole.size[1] <= 1536**2 and overview.size[0] * overview.size[1] <= 384**2


def slime_budget(policy: SlicingPolicy, plan: Plan) -> None:
    assert 3 <= len(plan.views) <= 8 and {view.size for view in plan.views} == {(336, 336)}


def none_budget(policy: SlicingPolicy, plan: Plan) -> None:
    assert [view.size for view in plan.views] == [(336, 336)]


BUDGETS = {
    "uhd": uhd_budget, "tiles": tiles_budget, "anyres": anyres_budget, "native": native_budget, "oryx": oryx_budget,
    "slime": slime_budget, "none": none_budget,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SLICING))
def test_plain_values_come_back(name: str) -> None:
    plain = POLICIES[name].to_dict()
    assert SLICING[plain.pop("type")](**plain) == POLICIES[name]


@pytest.mark.parametrize("name", sorted(SLICING))
@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0)])
def test_nothing_to_see_is_refused(name: str, size: Size) -> None:
    with pytest.raises(PlanError, match=rf"{size[0]}x{size[1]} pixels has nothing to see"):
        POLICIES[name].plan(size)


@pytest.mark.parametrize("name", sorted(SLICING))
def test_videos_have_a_plan_or_an_error_that_says_who_has(name: str) -> None:
    policy = POLICIES[name]
    if name in ("tiles", "anyres", "oryx"):
        plan = policy.plan_video((360, 640), 5)
        assert sorted({view.frame for view in plan.views}) == list(range(5))
        features = [torch.zeros(s.grid[0] * s.grid[1], 1) for s in plan.segments for _ in s.views]
        assert len(pack(plan, features, {m.name: torch.ones(1) for m in policy.markers()})) == plan.num_tokens
        with pytest.raises(PlanError, match="a video of 0 frames"):
            policy.plan_video((360, 640), 0)
    else:
        with pytest.raises(PlanError, match="has no plan for videos: choose tiles, anyres or oryx"):
            policy.plan_video((360, 640), 5)


@pytest.mark.parametrize("name", sorted(SLICING))
def test_a_model_says_how_many_tokens_a_view_has(name: str) -> None:
    """Fitted to a model, token settings are numbers, and another number is an error."""
    cell = {"native": 28, "oryx": 16}.get(name, 48)

    def tokens_of(role: object, size: Size) -> TokenShape:
        grid = (size[0] // cell, size[1] // cell) if name != "uhd" else (5, 5)
        return TokenShape(grid[0] * grid[1], 8, grid)

    fitted = POLICIES[name].fitted(tokens_of)
    plain = {key: value for key, value in fitted.to_dict().items() if key.startswith("tokens_per")}
    assert None not in plain.values()
    for key in plain:
        with pytest.raises(ValueError, match=rf"{key} 4 of slicing '{name}': this model makes {plain[key]}"):
            replace(POLICIES[name], **{key: 4}).fitted(tokens_of)


def test_a_prompt_of_no_images_is_refused() -> None:
    with pytest.raises(PlanError, match="a prompt of 0 images"):
        POLICIES["uhd"].plan((10, 10), 0)


@pytest.mark.parametrize(
    ("name", "settings_", "message"),
    [
        ("uhd", {"max_slices": 0}, "max_slices 0 of slicing 'uhd': must be at least 1"),
        ("uhd", {"scale_resolution": 10}, "scale_resolution 10 of slicing 'uhd' is below patch_size 14"),
        ("tiles", {"min_tiles": 13}, "min_tiles 13 of slicing 'tiles' is above max_tiles 12"),
        ("native", {"min_pixels": 10**9}, "min_pixels 1000000000 of slicing 'native' is above max_pixels"),
        ("oryx", {"stride": 20}, "stride 20 of slicing 'oryx' is no multiple of patch_size 16"),
        ("slime", {"tokens_per_tile": 143}, "tokens_per_tile 143 of slicing 'slime': must be a square"),
        ("none", {"size": [0, 3]}, r"size \[0, 3\] of slicing 'none'"),
        ("none", {"padding_colour": [1, 2, 256]}, r"padding_colour \[1, 2, 256\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLICING[name](**settings_)


def test_assumed_sizes_reach_both_ends() -> None:
    assert of_area_and_shape(0, 0) == (1, 1) and of_area_and_shape(1, 0) == (LONGEST, LONGEST)
    height, width = of_area_and_shape(0.7, 1)
    assert 195 < height / width < 205
