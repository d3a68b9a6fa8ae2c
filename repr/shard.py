"""Parameters that are split over processes by torch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from timm.models import group_parameters
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from repr.distributed import all_reduce, world_size


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
    return torch.linalg.vector_norm(norms(tensors)) if tensors else torch.tensor(0.0)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of P tensors, of sharded ones those of the whole: (P,), by one exchange; every rank must call it."""
    found = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    if not (sharded := [place for place, tensor in enumerate(tensors) if isinstance(tensor, DTensor)]):
        return found
    found[sharded] = all_reduce(found[sharded].square()).sqrt()
    return found
