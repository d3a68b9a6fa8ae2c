"""What flows ask of a config: of its views, its backbone, and the memory for its weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from repr.config import untrained
from repr.models.backbone import map_shape, nearest_size, pixel_convolutions, refused_sizes


def view_sizes(cfg: Any) -> list[int]:
    """The sides in pixels of all views that a config draws."""
    return [view.size for view in (cfg.get("views") or {}).values() for _ in range(view.get("count", 1))]


def backbone_faults(backbone: nn.Module, cfg: Any) -> Iterator[str]:
    """The sizes of views and of evaluation that a backbone cannot take, each with the nearest one that it can."""
    name = (cfg.get("backbone") or {}).get("name", type(backbone).__name__)
    sizes = sorted({*view_sizes(cfg), cfg.data.get("image_size", cfg.image_size)})
    for size, reason in refused_sizes(backbone, sizes).items():
        own = size == cfg.image_size  # a model that is made for one size is made anew for another
        near = nearest_size(partial(_made, cfg) if own else lambda _: backbone, size)
        hint = (
            ""
            if own or (cfg.get("backbone") or {}).get("dynamic_img_size")
            else ", or +backbone.dynamic_img_size=true if it is a ViT"
        )
        yield (
            f"backbone.name={name} cannot take pictures of {size} x {size} pixels ({reason}): set "
            f"{'image_size' if own else 'this size'} to {near or 'another size'}{hint}"
        )


def map_faults(backbone: nn.Module, cfg: Any, flow: str) -> Iterator[str]:
    """Sizes of views that a backbone takes, and gives no feature map of, or one of a single cell."""
    name = cfg.backbone.get("name")
    for size in sorted(set(view_sizes(cfg))):
        try:
            _, height, width = map_shape(backbone, size)
        except ValueError as error:
            if not refused_sizes(backbone, [size]):
                yield f"backbone.name={name}: {error}"
            return
        if height * width == 1 and not cfg.smoke:
            yield (
                f"backbone.name={name} makes one cell of a view of {size} x {size} pixels, and {flow} compares cells: "
                "raise image_size, or set +backbone.output_stride=8"
            )


def precision_faults(backbone: nn.Module, cfg: Any) -> Iterator[str]:
    """Sizes of views whose gradients a CPU computes wrongly in bfloat16 (torch 2.14)."""
    accelerator, precision = cfg.trainer.get("accelerator", "auto"), str(cfg.trainer.get("precision"))
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if not (on_cpu and precision.startswith("bf16")):
        return
    for size, name in pixel_convolutions(backbone, sorted(set(view_sizes(cfg)))).items():
        yield (
            f"trainer.precision={precision} on a CPU: of views of {size} x {size} pixels backbone.{name} sees maps "
            f"of one pixel, and torch gets its gradient wrong: set trainer.precision=32-true, or larger views"
        )


def _made(cfg: Any, size: int) -> nn.Module:
    """The backbone of a config, made for another size of pictures."""
    try:
        return instantiate(untrained(cfg).objective.backbone, image_size=size)
    except InstantiationException as error:
        raise ValueError(str(error)) from error


def weights_fault(objective: nn.Module) -> str | None:
    """Why weights, the teacher's among them, cannot be made on this machine, or None."""
    sizes = {name: tensor.nbytes for name, tensor in objective.named_parameters()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(sizes.values()) < memory:
        return None
    name = max(sizes, key=lambda name: sizes[name])
    shape = " x ".join(map(str, objective.get_parameter(name).shape))
    return (
        f"the weights take {sum(sizes.values()) / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB: set a "
        f"smaller backbone or head (the largest is {name}, {shape})"
    )


def warn_of_class_token(objective: Any, cfg: Any) -> None:
    """Warn where a flow that trains the patches of a ViT would be judged by its class token."""
    if getattr(objective.backbone, "global_pool", None) == "token" and not cfg.smoke:
        warnings.warn(
            f"{type(objective).__name__} trains the patches of {cfg.backbone.get('name')}, not its class token, which "
            "is what is evaluated and exported: set +backbone.global_pool=avg +backbone.fc_norm=false",
            stacklevel=3,
        )
