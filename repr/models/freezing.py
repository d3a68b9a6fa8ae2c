"""Parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import group_parameters
from torch import nn


def freeze(module: nn.Module, towers: Mapping[str, int]) -> None:
    """Train only the last layers of some towers; what lies outside of them (heads, temperature) stays trainable.

    ``towers`` says how many layers of a sub-module such as ``backbone`` or ``text`` are trained, as timm's
    ``group_matcher`` counts them (a ViT's last norm belongs to its last block). With 0 any module will do.

    Frozen modules are in evaluation mode, so that neither dropout nor the statistics of BatchNorm change anything.

    Raises:
        ValueError: there is no such tower, or it has fewer layers, or tells none.
    """
    children = dict(module.named_children())
    for name, num_trained in towers.items():
        if name not in children:
            raise ValueError(f"freeze.{name}: {type(module).__name__} has no such part; it has {', '.join(children)}")
        tower: Any = children[name]
        parameters = dict(tower.named_parameters())
        frozen = list(parameters)
        if num_trained:
            if not hasattr(tower, "group_matcher"):
                raise ValueError(f"freeze.{name}={num_trained}: {type(tower).__name__} tells no layers; set it to 0")
            layers = group_parameters(tower, tower.group_matcher(coarse=False), reverse=True)
            numbers = sorted(set(layers.values()))
            if not 0 < num_trained <= len(numbers):
                raise ValueError(f"freeze.{name}={num_trained}: it has {len(numbers)} layers; set it to 0 ... that")
            frozen = [parameter for parameter, layer in layers.items() if layer < numbers[-num_trained]]
        for parameter in frozen:
            parameters[parameter].requires_grad_(False)
        _eval_where_frozen(tower)


def _eval_where_frozen(module: nn.Module) -> None:
    """Put what has no trainable parameter left into evaluation mode."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _eval_where_frozen(child)
