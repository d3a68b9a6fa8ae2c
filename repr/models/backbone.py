"""Image backbones: timm's models as they are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import timm
import torch
from torch import Tensor, nn


def backbone(name: str, *, image_size: int | None = None, pretrained: bool = False, **options: Any) -> nn.Module:
    """Make a timm model without its classifier, called as ``backbone(images) -> (B, num_features)``.

    Args:
        name: such as ``vit_base_patch16_224`` or ``resnet50``.
        image_size: side of the input in pixels; handed over where the architecture depends on it.
        pretrained: load timm's weights (needs the network).
        options: further arguments of ``timm.create_model``.

    Raises:
        ValueError: timm has no such model; the nearest names are given.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else "; see timm.list_models()"
        raise ValueError(f"backbone.name is '{name}', which timm does not have{hint}")
    if image_size is not None and takes_image_size(name):
        options["img_size"] = image_size
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    # Convolutions follow the layout of their weights; this one is the faster on CPUs and tensor cores alike
    # (resnet10t at 48 px on two cores: 480 against 359 images/s).
    return model.to(memory_format=torch.channels_last)


def width_of(encoder: Any, attribute: str = "num_features") -> int:
    """The width of an encoder's output: ``num_features`` of an image encoder, ``output_dim`` of a text encoder.

    Raises:
        ValueError: the encoder does not tell its width, or is a timm model that ends with a classifier.
    """
    kind, example = {
        "num_features": ("backbone", "timm.create_model('resnet50', num_classes=0)"),
        "output_dim": ("text", "open_clip's TextTransformer(...)"),
    }[attribute]
    width = getattr(encoder, attribute, None)
    if not isinstance(encoder, nn.Module) or not isinstance(width, int):
        raise ValueError(
            f"{kind} is {type(encoder).__name__}, which has no {attribute}: give a module such as {example}, or one of "
            f"your own that has the width of its output in {attribute}"
        )
    num_classes: Any = getattr(encoder, "num_classes", 0)
    if kind == "backbone" and num_classes:
        raise ValueError(
            f"backbone {type(encoder).__name__} ends with a classifier of {num_classes} classes: make it with "
            "num_classes=0"
        )
    return width


def encode_views(backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Encode V views (B, 3, H_v, W_v) to (V * B, D): the rows of the first view, then those of the second, and so on.

    Neighbouring views of equal size pass the backbone together and share BatchNorm statistics.

    Raises:
        ValueError: the views hold unequal numbers of samples.
    """
    if len({len(view) for view in views}) > 1:
        counts = ", ".join(str(len(view)) for view in views)
        raise ValueError(f"the views of a batch hold {counts} samples: every view must hold the same samples")
    runs = [list(run) for _, run in groupby(views, key=lambda view: view.shape[2:])]
    return torch.cat([backbone(torch.cat(run)) for run in runs])


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last feature map of a timm model before pooling: (B, 3, H, W) -> (B, C, h, w).

    It is the last stage of a ResNet, or the patches of a ViT after its last norm. Cell (r, c) looks at the r-th strip
    from the top and the c-th from the left.

    Raises:
        ValueError: the model gives no map.
    """
    intermediates: Any = getattr(backbone, "forward_intermediates", None)
    if intermediates is None:
        raise ValueError(
            f"{type(backbone).__name__} gives no feature map; set backbone.name to a timm ResNet, ConvNeXt or ViT"
        )
    return intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]


def refused_sizes(backbone: nn.Module, sizes: Sequence[int]) -> dict[int, str]:
    """Which square inputs a backbone cannot take: side in pixels -> the first line of what the model says.

    It is given an input of each size; on torch's meta device nothing is computed.
    """
    device, refused = next(backbone.parameters()).device, {}
    for size in sizes:
        try:
            with torch.no_grad():
                backbone.eval()(torch.zeros(1, 3, size, size, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            refused[size] = str(error).split("\n")[0]
    return refused


def map_shape(backbone: nn.Module, size: int) -> tuple[int, int, int]:
    """Channels, height and width of a backbone's feature map for square input of ``size`` pixels.

    On torch's meta device nothing is computed.

    Raises:
        ValueError: it has no map, takes no such input, or its map has other channels than ``num_features``.
    """
    images = torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)
    try:
        with torch.no_grad():
            channels, height, width = feature_map(backbone.eval(), images).shape[1:]
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"no feature map of {size} x {size} pixels ({str(error).splitlines()[0]})") from error
    if channels != width_of(backbone):
        raise ValueError(
            f"its map has {channels} channels, and what it pools {width_of(backbone)}: choose a ResNet or ViT"
        )
    return channels, height, width


def takes_image_size(name: str) -> bool:
    """Whether the architecture has parameters (position tables) that depend on the size of the image."""
    module = inspect.getmodule(timm.model_entrypoint(name))
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    return any({"img_size", "num_classes"} <= inspect.signature(c.__init__).parameters.keys() for c in classes)
