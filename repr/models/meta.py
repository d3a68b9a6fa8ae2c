"""Asking a backbone on torch's meta device, where nothing is computed and no weights are copied."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Tensor]  # a backbone and pictures -> what a flow takes of them
# What a model may answer to arguments or to an input that it was not made for.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Answer = TypeVar("Answer")
_ANSWERS: dict[Any, Any] = {}  # of this process, see once_a_structure
_INTERNAL = {*vars(nn.Module()), "noted_forwards"}  # of a module; of these its hooks and tensors count


def once_a_structure(ask: Callable[..., Answer]) -> Callable[..., Answer]:
    """Remember what is found of timm's models: a picture on the meta device takes tens to hundreds of milliseconds."""

    @wraps(ask)
    def remembered(backbone: nn.Module, *args: Any) -> Answer:
        if not type(backbone).__module__.startswith("timm."):  # what others depend on is not known
            return ask(backbone, *args)
        key = (ask, _structure(backbone), *args)
        if key not in _ANSWERS:
            _ANSWERS[key] = ask(backbone, *args)
        return _ANSWERS[key]

    return remembered


def _structure(backbone: nn.Module) -> bytes:
    """A digest of all that shapes and gradients of a timm model depend on, which is its modules and their settings."""
    told = []
    for name, child in backbone.named_modules():
        settings = {key: value for key, value in vars(child).items() if key not in _INTERNAL}
        shapes = {key: value.shape for key, value in settings.items() if isinstance(value, Tensor)}
        # Classes by identity: in a notebook one is written anew under its name.
        told.append((name, id(type(child)), child._forward_hooks, child._forward_pre_hooks, settings | shapes))
    tensors = [(name, p.shape, p.requires_grad) for name, p in backbone.named_parameters()]
    return hashlib.sha256(repr((told, tensors)).encode()).digest()


def meta_copy(backbone: nn.Module) -> nn.Module | None:
    """A copy without memory on torch's meta device, in evaluation mode; None of a module that cannot be copied."""
    memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in backbone.buffers()} | {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        for tensor in backbone.parameters()
    }
    try:
        return copy.deepcopy(backbone, memo).eval()
    except REFUSALS:
        return None


def give_picture(model: Any, size: int, forward: Forward) -> Tensor:
    """What ``forward`` gives for one picture of ``size`` x ``size`` pixels, of a model on the meta device."""
    with torch.device("meta"):
        return forward(model, torch.zeros(1, 3, size, size))


def meta_output(backbone: nn.Module, forward: Forward = nn.Module.__call__, *, model: nn.Module | None = None) -> Any:
    """What ``forward`` gives on the meta device for a picture of the first size that the model takes, or None."""
    model = model or meta_copy(backbone)
    if model is None:
        return None
    usual = getattr(backbone, "pretrained_cfg", None) or {}
    patches = getattr(backbone, "patch_embed", None)
    sizes = [
        getattr(patches, "img_size", None),
        getattr(backbone, "image_size", None),
        usual.get("input_size"),
        224,
        32,
    ]
    for size in sizes:
        side = size[-1] if isinstance(size, list | tuple) else size
        try:
            output = give_picture(model, side, forward) if isinstance(side, int) else None
        except REFUSALS:
            continue
        if isinstance(output, Tensor):
            return output
    return None
