"""Image backbones: timm's models as they are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any

import timm
import torch
from torch import Tensor, nn

from repr.errors import first_line
from repr.hub import fetching
from repr.models.meta import REFUSALS, give_picture, meta_copy, meta_output, once_a_structure
from repr.models.once import encode_run

FARTHEST = 64  # pixels to which a size that fits is looked for


def backbone(name: str, *, image_size: int | None = None, pretrained: bool = False, **options: Any) -> nn.Module:
    """Make a timm model without its classifier, called as ``backbone(images) -> (B, D)``; :func:`width_of` tells D.

    Args:
        name: such as ``vit_base_patch16_224`` or ``resnet50``.
        image_size: side of the input in pixels; handed over where the architecture depends on it.
        pretrained: load timm's weights (needs the network).
        options: further arguments of ``timm.create_model``.

    Raises:
        ValueError: timm has no such model (the nearest names are given), it cannot be made so, or takes no pictures of
            three channels.
        ConnectionError: its weights cannot be fetched.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else "; see timm.list_models()"
        raise ValueError(f"backbone.name is '{name}', which timm does not have{hint}")
    if (channels := options.get("in_chans", 3)) != 3:
        raise ValueError(f"backbone.in_chans={channels}: views have three channels, so leave it out")
    if image_size is not None and takes_image_size(name):
        options["img_size"] = image_size
    try:
        with fetching(f"the weights of timm's {name}"):
            model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except REFUSALS as error:
        size = options.pop("img_size", None)
        make = partial(timm.create_model, name, num_classes=0, **options)
        fits = None if size is None else nearest_size(lambda size: make(img_size=size), size)
        hint = "" if fits is None else f"; the nearest image_size that it takes is {fits}"
        raise ValueError(f"backbone.name={name} cannot be made so: {first_line(error)}{hint}") from error
    model.image_size = image_size  # see meta_output
    # Convolutions follow the layout of their weights; this one is the faster on CPUs and tensor cores alike
    # (resnet10t at 48 px on two cores: 480 against 359 images/s). With it, torch 2.14 on a CPU crashes in the backward
    # of a strided convolution of single pixels on pictures, as MobileOne and RepVGG begin with.
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    if any(c.in_channels == 3 and c.kernel_size == (1, 1) and max(c.stride) > 1 for c in convolutions):
        return model
    return model.to(memory_format=torch.channels_last)


def width_of(encoder: Any, attribute: str = "num_features") -> int:
    """The width of an encoder's output: of an image encoder as it is, of a text encoder ``output_dim``.

    Where timm models widen what they pool, ``num_features`` is that of the map before. So an image encoder is asked for
    a picture on torch's meta device; ``num_features`` counts where it takes none there.

    Raises:
        ValueError: the encoder does not tell its width, gives no rows, or is a timm model that ends with a classifier.
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
    shape = None if kind == "text" else _shape(encoder)
    if shape is None or (len(shape) != 2 and not hasattr(encoder, "pretrained_cfg")):  # none of timm's
        return width
    if len(shape) != 2:
        raise ValueError(
            f"backbone {type(encoder).__name__} gives {shape} for one picture, and a row of features is "
            "needed: set +backbone.global_pool=avg, or another backbone.name"
        )
    return shape[1]


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
    return torch.cat([encode_run(backbone, run) for run in runs])


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


def every_token(backbone: Any, images: Tensor) -> Tensor:
    """What a timm model gives before it pools: (B, 3, H, W) -> (B, T, C) of a ViT, the last map of others."""
    return backbone.forward_features(images)


def feature_maps(backbone: nn.Module, images: Tensor, num: int) -> list[Tensor]:
    """The maps of the last stages or blocks of a timm model, each as :func:`feature_map` gives the last."""
    model: Any = backbone
    return model.forward_intermediates(images, indices=num, norm=True, output_fmt="NCHW", intermediates_only=True)


def map_channels(backbone: nn.Module, num: int) -> list[int]:
    """Channels of :func:`feature_maps`, as a timm model tells them.

    Raises:
        ValueError: it has fewer maps.
    """
    stages: Any = getattr(backbone, "feature_info", [])
    if not 1 <= num <= len(stages):
        raise ValueError(
            f"num_levels={num}: {type(backbone).__name__} has {len(stages)} feature maps; set it to 1 or more, at most "
            "so many, and backbone.name to a timm ResNet, ConvNeXt or ViT"
        )
    return [stage["num_chs"] for stage in stages[-num:]]


def pooled_and_map(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm model makes of pictures, (B, D), and the feature map that it pools, (B, C, h, w), in one pass."""
    model: Any = backbone
    last, maps = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
    return model.forward_head(last), maps[-1]


def refused_sizes(backbone: nn.Module, sizes: Sequence[int]) -> dict[int, str]:
    """Which square inputs a backbone cannot take: side in pixels -> the first line of what the model says.

    It is given a picture of each size on torch's meta device, where nothing is computed; a model that cannot be run
    there refuses none.
    """
    answers = {size: _refusal(backbone, size) for size in sizes}
    return {size: answer for size, answer in answers.items() if answer is not None}


def nearest_size(make: Callable[[int], nn.Module], size: int) -> int | None:
    """The size nearest to ``size`` that a model takes which ``make`` builds for it, or None."""
    for distance in range(1, FARTHEST + 1):
        for near in (size - distance, size + distance):
            try:
                with torch.device("meta"), torch.random.fork_rng(devices=[]):
                    model = make(near) if near > 0 else None
            except REFUSALS:
                continue
            if model is not None and not refused_sizes(model, [near]):
                return near
    return None


def map_shape(backbone: nn.Module, size: int) -> tuple[int, int, int]:
    """Channels, height and width of a backbone's feature map for square input of ``size`` pixels.

    It is asked on torch's meta device, where nothing is computed.

    Raises:
        ValueError: it has no map, takes no such input, or its map has other channels than what it gives.
    """
    try:
        with torch.no_grad():
            channels, height, width = give_picture(meta_copy(backbone), size, feature_map).shape[1:]
    except REFUSALS as error:
        raise ValueError(f"no feature map of {size} x {size} pixels ({first_line(error)})") from error
    if channels != width_of(backbone):
        raise ValueError(
            f"its map has {channels} channels, and what it pools {width_of(backbone)}: choose a ResNet or ViT"
        )
    return channels, height, width


def pixel_convolutions(backbone: nn.Module, sizes: Sequence[int]) -> dict[int, str]:
    """For which square inputs a convolution with a stride sees a map of one pixel: side in pixels -> the first such.

    Their weight gradients are wrong in bfloat16 on a CPU (torch 2.14).
    """
    if (model := meta_copy(backbone)) is None:
        return {}
    found, seen = dict[int, str](), list[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1:

            def look(_: nn.Module, inputs: Any, name: str = name) -> None:
                if inputs[0].shape[-2:] == (1, 1):
                    seen.append(name)

            module.register_forward_pre_hook(look)
    for size in sizes:
        seen.clear()
        with suppress(*REFUSALS), torch.no_grad():
            give_picture(model, size, nn.Module.__call__)
        if seen:
            found[size] = seen[0]
    return found


@once_a_structure
def _shape(backbone: nn.Module) -> tuple[int, ...] | None:
    """The shape of what a backbone gives for one picture, or None."""
    with torch.no_grad():
        output = meta_output(backbone)
    return None if output is None else tuple(output.shape)


@once_a_structure
def _refusal(backbone: nn.Module, size: int) -> str | None:
    if (model := meta_copy(backbone)) is None:
        return None
    try:
        with torch.no_grad():
            give_picture(model, size, nn.Module.__call__)
    except REFUSALS as error:
        of_device = isinstance(error, NotImplementedError) or "meta" in str(error)
        return None if of_device else first_line(error)
    return None


def takes_image_size(name: str) -> bool:
    """Whether the architecture has parameters (position tables) that depend on the size of the image."""
    module = inspect.getmodule(timm.model_entrypoint(name))
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    return any({"img_size", "num_classes"} <= inspect.signature(c.__init__).parameters.keys() for c in classes)
