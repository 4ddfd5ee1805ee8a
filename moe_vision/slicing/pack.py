"""From the tokens of each view to the tokens of the image, in the plan's order."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from moe_vision.slicing.plan import Marker, Plan, Segment


def pack(plan: Plan, features: Sequence[torch.Tensor], markers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens [N, D] of each view of the plan, and embeddings [D] of its markers by name → [plan.num_tokens, D].

    Raises ValueError where the features are not those that the plan promises.
    """
    expected = [segment.grid[0] * segment.grid[1] for segment in plan.segments for _ in segment.views]
    found = [feature.shape[0] for feature in features]
    if found != expected:
        raise ValueError(f"a plan of '{plan.policy}' promises {expected} tokens of its views, and got {found}")
    remaining = iter(features)
    parts = []
    for piece in plan.pieces:
        if isinstance(piece, Marker):
            parts.append(markers[piece.name][None])
        else:
            parts.append(lay_out(piece, [next(remaining) for _ in piece.views], markers))
    return torch.cat(parts)


def lay_out(segment: Segment, features: Sequence[torch.Tensor], markers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One segment's views [N, D] each → its tokens [rows * columns, D] with row ends: stitched, cropped, resized."""
    (rows, columns), (height, width) = segment.layout, segment.grid
    x = torch.stack(list(features)).view(rows, columns, height, width, -1)
    x = x.transpose(1, 2).reshape(rows * height, columns * width, -1)
    if segment.keep is not None:
        top, left, kept_height, kept_width = segment.keep
        x = x[top : top + kept_height, left : left + kept_width]
    if segment.out is not None and tuple(x.shape[:2]) != segment.out:
        x = F.interpolate(x.permute(2, 0, 1)[None], segment.out, mode="bilinear")[0].permute(1, 2, 0)
    if segment.row_end is not None:
        x = torch.cat((x, markers[segment.row_end.name].to(x).expand(x.shape[0], 1, -1)), dim=1)
    return x.flatten(0, 1)


def places(plan: Plan) -> torch.Tensor:
    """(down, across) of the middle of what each token shows, as shares of its picture: [num_tokens, 2]; markers: 0."""
    of_views = []
    for segment in plan.segments:
        rows, columns = segment.grid
        for view in segment.views:
            top, left, height, width = view.region
            down = top + height * (torch.arange(rows) + 0.5) / rows
            across = left + width * (torch.arange(columns) + 0.5) / columns
            of_views.append(torch.cartesian_prod(down, across))
    markers = [piece for piece in plan.pieces if isinstance(piece, Marker)]
    markers += [segment.row_end for segment in plan.segments if segment.row_end is not None]
    return pack(plan, of_views, {marker.name: torch.zeros(2) for marker in markers})
