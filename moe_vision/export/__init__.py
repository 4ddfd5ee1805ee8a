"""Export: a fused model as a folder that loads with `transformers` alone.

model/ ─ flatten() ─ modeling_moe_vision.py ─┐
       └ weights, processor, tokenizer, card ┴─ self-test in a process without moe_vision ─ destination
"""

from moe_vision.export.flatten import FlattenError, flatten
from moe_vision.export.hf import ExportError, ExportReport, export

__all__ = ["ExportError", "ExportReport", "FlattenError", "export", "flatten"]
