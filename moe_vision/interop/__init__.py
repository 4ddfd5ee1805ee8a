"""Checkpoints that other projects published, brought in: their folders become ours."""

from moe_vision.interop.eagle import import_eagle

__all__ = ["import_eagle"]
