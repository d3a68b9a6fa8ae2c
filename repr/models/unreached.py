"""What a flow does not train of a backbone, and freezing it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repr.models.meta import REFUSALS, Forward, meta_copy, meta_output, once_a_structure


def freeze_unreached(backbone: nn.Module, flow: str, forward: Forward = nn.Module.__call__) -> None:
    """Freeze the parameters that a loss on ``forward(backbone, pictures)`` does not reach; a warning names them.

    DDP waits for the gradient of every other. Gains and biases of a norm after what the flow takes are frozen as they
    are; a backbone with more than that behind it is refused, since what it gives would be random. Of a backbone that
    several flows share nothing is frozen yet, see :func:`noted_forwards`.

    Raises:
        ValueError: weights between what the flow trains and what is evaluated.
    """
    if (noted := vars(backbone).get("noted_forwards")) is not None:
        noted.append(forward)
        return
    _freeze(backbone, unreached(backbone, [forward]), flow, pooled=forward is nn.Module.__call__)


@contextmanager
def noted_forwards(backbone: nn.Module) -> Iterator[list[Forward]]:
    """While it lasts, :func:`freeze_unreached` freezes nothing, and notes how a flow runs the backbone.

    What one flow does not reach another may; :func:`freeze_common` is for when all are known.
    """
    vars(backbone)["noted_forwards"] = noted = list[Forward]()
    try:
        yield noted
    finally:
        del vars(backbone)["noted_forwards"]


def freeze_common(backbone: nn.Module, flow: str, names: Collection[str]) -> None:
    """Freeze the parameters that none of several flows reaches; see :func:`freeze_unreached`."""
    _freeze(backbone, names, flow, pooled=False)


def _freeze(backbone: nn.Module, names: Collection[str], flow: str, *, pooled: bool) -> None:
    heavy = [name for name in names if backbone.get_parameter(name).ndim > 1]
    if not pooled and heavy:
        pooling = getattr(backbone, "global_pool", "avg")  # of a convolutional network it may be a module
        hint = "+backbone.global_pool=avg, or " if isinstance(pooling, str) and pooling != "avg" else ""
        more = f" and {len(heavy) - 3} more" if len(heavy) > 3 else ""
        raise ValueError(
            f"{flow} does not train {', '.join(heavy[:3])}{more} of the backbone, through which passes what is "
            f"evaluated and exported: set {hint}another backbone.name"
        )
    for name in names:
        backbone.get_parameter(name).requires_grad_(False)
    if names:
        warnings.warn(f"{flow} does not reach {', '.join(names)} of the backbone: frozen as they are", stacklevel=4)


def unreached(backbone: nn.Module, forwards: Sequence[Forward]) -> list[str]:
    """Names of the trainable parameters that have no gradient from what one of ``forwards`` gives."""
    names = {name for forward in forwards for name in _unreached(backbone, forward)}
    return [name for name, _ in backbone.named_parameters() if name in names]


@once_a_structure
def _unreached(backbone: nn.Module, forward: Forward) -> list[str]:
    model = meta_copy(backbone)
    with torch.enable_grad():
        output = None if model is None else meta_output(backbone, forward, model=model)
    if model is None or output is None or not output.requires_grad:
        return []
    reached = _leaves(output)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if reached.issuperset(named.values()):  # as of most; gradients, which take longer, are asked only of the others
        return []
    try:
        gradients = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
    except REFUSALS:
        return []
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]


def _leaves(output: Tensor) -> set[Tensor]:
    """The parameters from which a tensor was computed, by autograd's graph."""
    leaves, seen, nodes = set[Tensor](), set[Any](), [output.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [function for function, _ in node.next_functions]
    return leaves
