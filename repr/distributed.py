"""Communication between processes, a no-op on one process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeVar

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


def _reduced(x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sum or maximum over ranks as a new tensor: autograd may use a gradient elsewhere too."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op)
    return out


def _by_rank(parts: Sequence[Tensor]) -> list[Tensor]:
    """What is numbered from this rank on, 0 for itself, in the order of ranks."""
    start = world_size() - rank()
    return [*parts[start:], *parts[:start]]


def _reduce_scatter(out: Tensor, parts: Sequence[Tensor], group: Any = None) -> Callable[[], Any]:
    """Begin to sum what all ranks of a group have for each, ``parts`` by rank, into the ``out`` of each.

    gloo has it since torch 2.8; before, every rank gets all sums, which is what gloo does inside.

    Returns:
        What waits until ``out`` has its sum.
    """
    if torch.__version__ >= "2.8" or dist.get_backend(group) != "gloo":
        return dist.reduce_scatter(out, list(parts), group=group, async_op=True).wait
    sums = torch.stack(list(parts))
    work = dist.all_reduce(sums, group=group, async_op=True)

    def wait() -> None:
        work.wait()
        out.copy_(sums[dist.get_rank(group)])

    return wait


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own_first: bool) -> Tensor:
        ctx.own_first = own_first
        out = x.new_empty(world_size(), *x.shape)
        dist.all_gather(_by_rank(list(out)) if own_first else list(out), x.contiguous())
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The sum over ranks is W times the true gradient; the mean that DDP and FSDP2 take afterwards makes it exact.
        parts = list(grads[0].contiguous().unflatten(0, (world_size(), -1)))
        out = torch.empty_like(parts[0])
        _reduce_scatter(out, _by_rank(parts) if ctx.own_first else parts)()
        return out, None


def gather(x: Tensor, *, own_first: bool = False) -> Tensor:
    """Concatenate the rows (B, ...) of all ranks, equally many on each: (W * B, ...).

    They are in the order of ranks, or from this rank's on to those of the one before it. The gradient that reaches
    ``x`` is the sum over ranks of the gradients of their losses; when every rank has the value of the same loss of the
    gathered rows, the mean over ranks that DDP takes of parameter gradients equals the gradient of one process on the
    same global batch.
    """
    return _Gather.apply(x, own_first) if world_size() > 1 else x


class Routes(NamedTuple):
    """Which rows go where when each rank asks for some of the rows that all have together."""

    order: Tensor  # (m,) places of what this rank asks for, by the rank that has it
    asked: list[int]  # of how many rows, of each rank
    sent: Tensor  # (s,) which of this rank's rows go out, by the rank that asks
    sent_to: list[int]  # how many rows, to each rank


def routes(index: Tensor, num: int) -> Routes:
    """Routes of the rows with the numbers ``index`` (m,), of ``num`` on each rank; m is the same on all ranks."""
    world = world_size()
    wanted = gather(index).unflatten(0, (world, -1))  # (W, m)
    homes = wanted // num
    asked = [int((homes[rank()] == other).sum()) for other in range(world)]
    mine = homes == rank()
    sent = [wanted[other][mine[other]] - rank() * num for other in range(world)]
    order = homes[rank()].argsort(stable=True)
    return Routes(order, asked, torch.cat(sent), [len(rows) for rows in sent])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.num, ctx.routes = len(x), routes(index, len(x))
        order, asked, sent, sent_to = ctx.routes
        came = x.new_empty(len(index), *x.shape[1:])
        dist.all_to_all_single(came, x[sent], asked, sent_to)
        out = torch.empty_like(came)
        out[order] = came
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        order, asked, sent, sent_to = ctx.routes
        came = grads[0].new_empty(len(sent), *grads[0].shape[1:])
        dist.all_to_all_single(came, grads[0][order], sent_to, asked)
        out = came.new_zeros(ctx.num, *came.shape[1:])
        return out.index_put_((sent,), came, accumulate=True), None  # in one order always, unlike index_add_ on a GPU


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of what all ranks have together, (B, ...) each, by their numbers (m,), as many on each rank: (m, ...).

    Only these rows travel. The gradient has the convention of :func:`gather`.
    """
    return _Take.apply(x, index) if world_size() > 1 else x[index]


def spread(x: Tensor, chunk_size: int | None) -> Tensor:
    """The rows (B, ...) of all ranks from this one on, without gradient, sent by ``chunk_size``: (W, B, ...)."""
    if world_size() == 1:
        return x[None]
    out = x.new_empty(world_size(), *x.shape)
    for rows, part in zip(out.split(chunk_size or len(x), 1), x.split(chunk_size or len(x)), strict=True):
        dist.all_gather(_by_rank(list(rows)), part)
    return out


def add_up_at_home(out: Tensor, parts: Tensor) -> Callable[[], Any]:
    """Begin to sum over ranks what each has for each, ``parts`` (W, ...) from this rank on, into its ``out`` (...).

    Returns:
        What waits until ``out`` has the sum.
    """
    added = _reduce_scatter(out, _by_rank(list(parts)))

    def wait(sent: Tensor = parts) -> None:  # which it keeps until then
        added()

    return wait


def gather_objects(value: Any) -> list[Any]:
    """The plain Python values of all ranks, in rank order; every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], T]) -> T:
    """Run ``work`` on the first process, and give its result on all; every rank must call it.

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


def pass_on(tensors: Sequence[Tensor], step: int = 1) -> tuple[list[Tensor], Callable[[], None]]:
    """Begin to hand tensors to the rank ``step`` before this one, and to take as many from the one ``step`` after it.

    All ranks must call it, with tensors of the same shapes; it has a group of processes of its own.

    Returns:
        What comes, and what waits for it; ``tensors`` are to be left as they are until then.
    """
    came = [torch.empty_like(x) for x in tensors]
    group, before, after = _ring(dist.group.WORLD), (rank() - step) % world_size(), (rank() + step) % world_size()
    sends = [dist.P2POp(dist.isend, x, before, group, tag) for tag, x in enumerate(tensors)]
    takes = [dist.P2POp(dist.irecv, x, after, group, tag) for tag, x in enumerate(came)]
    works = dist.batch_isend_irecv([*sends, *takes]) if tensors else []

    def wait() -> None:
        for work in works:
            work.wait()

    return came, wait


@lru_cache(maxsize=1)
def _ring(world: Any) -> Any:
    return dist.new_group()


def node_size() -> int:
    """How many processes each machine has, where there are several machines that have equally many; else 1.

    Every rank must call it the first time.
    """
    return _node_size(dist.group.WORLD) if world_size() > 1 else 1


@lru_cache(maxsize=1)
def _node_size(world: Any) -> int:
    sizes = [len(list(ranks)) for _, ranks in groupby(gather_objects(socket.gethostname()))]
    return sizes[0] if len(sizes) > 1 and len(set(sizes)) == 1 else 1


@lru_cache
def _near(world: Any, size: int) -> Any:
    """The group of this rank among groups of ``size`` ranks that follow each other."""
    return dist.new_subgroups(size)[0]


def gather_near(x: Tensor, size: int) -> Tensor:
    """What each of the ``size`` ranks of this rank's machine has (...), without gradient: (size, ...)."""
    if size == 1:
        return x[None]
    out = x.new_empty(size, *x.shape)
    dist.all_gather(list(out), x, _near(dist.group.WORLD, size))
    return out


def add_up_near(parts: Tensor) -> Tensor:
    """The sum of what the ranks of this rank's machine have for it: of (size, ...) from each to (...)."""
    if len(parts) == 1:
        return parts[0]
    out = torch.empty_like(parts[0])
    _reduce_scatter(out, list(parts), _near(dist.group.WORLD, len(parts)))()
    return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alike: bool) -> Tensor:
        ctx.alike = alike
        return _reduced(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * world_size() if ctx.alike else _reduced(grads[0]), None


def all_reduce(x: Tensor, op: Literal["sum", "max"] = "sum", *, alike: bool = False) -> Tensor:
    """Sum or maximum over ranks, element by element; ``x`` itself stays as it is.

    A sum keeps gradients, with the convention of :func:`gather`; a maximum has none. Where all ranks go on ``alike``
    with the sum, as with the value of a loss, its gradients are the same, and none is communicated.
    """
    if world_size() == 1:
        return x
    return _Sum.apply(x, alike) if op == "sum" else _reduced(x, dist.ReduceOp.MAX)


def mean(x: Tensor) -> Tensor:
    """Mean over ranks, with which all go on alike: each gets for its own the gradient that the mean has."""
    return all_reduce(x, alike=True) / world_size()


def means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The :func:`mean` of scalars, all at once."""
    return dict(zip(values, mean(torch.stack(list(values.values()))).unbind(), strict=True)) if values else {}
