"""Communication between processes; every function is a no-op on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather(list(out.split(x.shape[0])), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank differentiates its own copy of the same global loss: the sum over ranks is W times the
        # true gradient, and the mean that DDP and FSDP2 take afterwards makes it exact.
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, keeping gradients.

    Args:
        x: (B, ...) with the same B on every rank.

    Returns:
        (W * B, ...). The gradient that reaches ``x`` is the sum over ranks of the gradients of their
        losses; when every rank computes the same loss of the gathered rows, the mean over ranks that DDP
        takes of parameter gradients equals the gradient of one process on the same global batch.
    """
    return _Gather.apply(x) if world_size() > 1 else x


def gather_objects(value: Any) -> list[Any]:
    """The plain Python values of all ranks, in rank order; every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first process, on all of them; every rank must call it.

    Raises:
        ValueError: ``work`` has raised it; all ranks do.
        OSError: likewise.
    """
    if world_size() == 1:
        return work()
    value = fault = None
    if rank() == 0:
        try:
            value = work()
        except (ValueError, OSError) as error:
            fault = error
    value, fault = gather_objects((value, fault))[0]
    if fault is not None:
        raise fault
    return value


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def all_reduce(x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
    """Sum or maximum over ranks, element by element.

    Args:
        x: any shape, the same on every rank.
        op: a sum keeps gradients, with the convention of :func:`gather`; a maximum has none.

    Returns:
        A tensor of the same shape; ``x`` itself stays as it is.
    """
    if world_size() == 1:
        return x
    if op == "sum":
        return _Sum.apply(x)
    out = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return out
