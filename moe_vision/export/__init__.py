"""Export: a fused model as a folder that loads with `transformers` alone.

model/ ─ flatten() ─ modeling_moe_vision.py ─┐
       └ weights, processor, tokenizer, card ┴─ self-test in a process without moe_vision ─ destination
"""

import sys
from types import ModuleType
from typing import Any

from moe_vision.export.hf import ExportError, ExportReport, export, verify
from moe_vision.modeling.flatten import FlattenError, flatten

__all__ = ["ExportError", "ExportReport", "FlattenError", "export", "flatten", "verify"]


class CallableModule(ModuleType):
    """`moe_vision.export` is this module once something has imported it, and the function before: both are called."""

    def __call__(self, *args: Any, **kwargs: Any) -> ExportReport:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule
