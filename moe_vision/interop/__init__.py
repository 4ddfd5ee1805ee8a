"""Checkpoints that other projects published, brought in: their folders become ours."""

from moe_vision.interop.eagle import import_eagle
from moe_vision.interop.llava_uhd import import_llava_uhd
from moe_vision.interop.slime import import_slime

__all__ = ["import_eagle", "import_llava_uhd", "import_slime"]
