"""Checkpoints that other projects published, brought in: their folders become ours."""

from moe_vision.interop.eagle import import_eagle
from moe_vision.interop.llava_uhd import import_llava_uhd

__all__ = ["import_eagle", "import_llava_uhd"]
