"""Gradients of parts that a batch does not use: zeros, so that such a batch trains as any other does.

A batch without images uses no adapter. Without a gradient for one, `backward` raises where nothing else trains, DDP
waits for a gradient that never comes, and sharded modules wait for each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class ZeroGradients(torch.autograd.Function):
    """The first tensor as it is; in the backward pass the others get zeros, whatever they hold."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.like = [(other.shape, other.dtype, other.device) for other in others]
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like]
        return gradients[0], *zeros


def with_zero_gradients(values: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """`values`, bit for bit. Those of `others` that require gradients get zeros when something behind `values` is
    differentiated."""
    trained = [other for other in others if other.requires_grad]
    return ZeroGradients.apply(values, *trained) if trained else values


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is held in parts that are gathered when its module runs: by FSDP2, as a DTensor, or by
    DeepSpeed's ZeRO-3. Then every process has to run the module, or those that do wait for ever."""
    return hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")
