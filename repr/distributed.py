"""Communication between processes, a no-op on one process; and parameters that are split over processes (FSDP2)."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from timm.models import group_parameters
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

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


def shard(module: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None) -> None:
    """Split the parameters of all that an objective calls over the processes of ``mesh``, by torch's ``fully_shard``.

    Each child is gathered when it is called and freed afterwards, and inside it each of its :func:`layers` likewise.
    Methods ``forward_*`` of a child may be called as its ``forward``. Between calls a parameter is a DTensor with this
    process's rows. Parameters of the module itself, such as a temperature, stay whole on every process; their gradients
    are averaged. All start as on the first process. Layers without BatchNorm are gathered and computed in
    ``param_dtype``, or in their own type if it is None; gradients are summed in float32.

    Convolutions lose the memory layout ``channels_last``, which ``fully_shard`` does not know.

    Raises:
        ValueError: the module cannot be sharded.
    """
    if fault := shard_fault(module):
        raise ValueError(f"{type(module).__name__} cannot be sharded: {fault}. Set trainer=ddp")
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            first = tensor.detach().to(device).contiguous()
            dist.broadcast(first, 0)
            tensor.copy_(first)
            if not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()
    plain, layer = (MixedPrecisionPolicy(d, torch.float32, cast_forward_inputs=False) for d in (None, param_dtype))
    for _, child in called(module):
        for part in layers(child):
            has_norm = any(isinstance(norm, _BatchNorm) for norm in part.modules())
            fully_shard(part, mesh=mesh, mp_policy=plain if has_norm else layer, reshard_after_forward=True)
        fully_shard(child, mesh=mesh, mp_policy=plain, reshard_after_forward=True)
        for name in dir(child):
            if name.startswith("forward_") and callable(getattr(child, name)):
                register_fsdp_forward_method(child, name)
    for parameter in uncalled_parameters(module).values():
        parameter.data = parameter.data.to(device)
        if parameter.requires_grad:
            # Once for every backward: what was accumulated before is the same everywhere, and a mean leaves it so.
            parameter.register_post_accumulate_grad_hook(_average_grad)


def _average_grad(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def shard_fault(module: nn.Module) -> str | None:
    """What keeps a module from being sharded, or None."""
    owners: dict[nn.Parameter, str] = {}
    for name, child in called(module):
        for parameter_name, parameter in child.named_parameters():
            path = f"{name}.{parameter_name}"
            if parameter.ndim == 0:
                return f"{path} is a scalar inside a module, and torch shards none"
            if owners.setdefault(parameter, name) != name:
                return f"{path} is a parameter of {owners[parameter]} too, and each is gathered by itself"
    return None


def called(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules with parameters that an objective calls: its children, and those of containers among them."""
    containers = nn.ModuleList | nn.ModuleDict | LightningModule
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        if type(child).forward is nn.Module.forward or isinstance(child, containers):
            yield from ((f"{name}.{below}", part) for below, part in called(child))
        else:
            yield name, child


def uncalled_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the objective itself, such as a temperature, and of the objectives that are its parts."""
    paths = tuple(f"{name}." for name, _ in called(module))
    return {name: parameter for name, parameter in module.named_parameters() if not name.startswith(paths)}


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The large parts of a module that are called one after the other.

    In a timm model they are the largest part of every layer after the stem, as its ``group_matcher`` tells: blocks of a
    ViT, stages of a ResNet or ConvNeXt. In any other they are the elements of its lists of modules of one class.
    """
    if hasattr(module, "group_matcher"):
        for path in _timm_layers(module):
            part = module.get_submodule(path)
            # timm calls the elements themselves where it checkpoints them.
            parts = part if isinstance(part, nn.Sequential) else [part]
            yield from (part for part in parts if next(part.children(), None) is not None)
        return
    stacks: list[nn.Module] = []
    for part in module.modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential) or any(part in stack.modules() for stack in stacks):
            continue
        if len({type(element) for element in part.children()}) == 1:
            stacks.append(part)
            yield from (element for element in part.children() if next(element.children(), None) is not None)


def _timm_layers(module: Any) -> Iterator[str]:
    """Paths such as ``blocks.3``, ``layer2`` or ``stages.1``: what the parameters of a layer's largest part share."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    groups: dict[int, list[str]] = group_parameters(module, module.group_matcher(coarse=True))
    for number in sorted(groups)[1:]:
        parts: dict[str, list[str]] = defaultdict(list)  # first name of the path -> paths
        for name in groups[number]:
            parts[name.partition(".")[0]].append(name)
        largest = max(parts.values(), key=lambda names: sum(sizes[name] for name in names))
        path: list[str] = []
        for names in zip(*(name.split(".")[:-1] for name in largest), strict=False):
            if len(set(names)) > 1 or (path and path[-1][-1].isdigit()):
                break
            path.append(names[0])
        if path:
            yield ".".join(path)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which every rank must ask for; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; any other tensor itself."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, sharded as another tensor of its shape is; nothing is communicated."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    rows = tensor.chunk(mesh.size())
    mine = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else tensor[:0]
    mine = mine.to(like.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(mine, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all tensors as one vector, of sharded ones the whole; every rank must call it."""
    tensors = list(tensors)
    sharded = [local(tensor) for tensor in tensors if isinstance(tensor, DTensor)]
    norm = nn.utils.get_total_norm(tensor for tensor in tensors if not isinstance(tensor, DTensor))
    if not sharded:
        return norm
    norm_of_sharded = nn.utils.get_total_norm(sharded)
    return (all_reduce(norm_of_sharded.square()) + norm.to(norm_of_sharded.device).square()).sqrt()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of P tensors, of sharded ones those of the whole: (P,), by one exchange; every rank must call it."""
    found = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    if not (sharded := [place for place, tensor in enumerate(tensors) if isinstance(tensor, DTensor)]):
        return found
    found[sharded] = all_reduce(found[sharded].square()).sqrt()
    return found
