"""Slicing: what a model sees of an image of any size, planned in integers before a pixel is read.

(height, width) ─ SlicingPolicy.plan ─ Plan ─ render ─ views ─ … ─ features ─ pack ─ tokens in the plan's order
"""

from moe_vision.registry import SLICING
from moe_vision.slicing.anyres import AnyresSlicing
from moe_vision.slicing.base import SlicingPolicy
from moe_vision.slicing.native import NativeSlicing
from moe_vision.slicing.none import NoSlicing
from moe_vision.slicing.oryx import OryxSlicing
from moe_vision.slicing.plan import Crop, Marker, Pad, Plan, PlanError, Resize, Segment, Size, View
from moe_vision.slicing.slime import SlimeSlicing
from moe_vision.slicing.tiles import TileSlicing
from moe_vision.slicing.uhd import UhdSlicing

__all__ = [
    "SLICING", "AnyresSlicing", "Crop", "Marker", "NativeSlicing", "NoSlicing", "OryxSlicing", "Pad", "Plan",
    "PlanError", "Resize", "Segment", "Size", "SlicingPolicy", "SlimeSlicing", "TileSlicing", "UhdSlicing", "View",
]  # fmt: skip
