"""Where a backbone lies among the tensors of a file, whoever wrote it, and under which names of its own."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repr.models.meta import REFUSALS

_TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")  # in the modules of timm's models
_AVERAGED = re.compile(r"(?<![a-z])(ema|teacher)(?![a-z])")  # what timm, DINO and their kind evaluate
_VIT_OF_TORCHVISION = {
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"\.ln_": ".norm",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",
    r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
}


@dataclass(frozen=True)
class Found:
    """Tensors below a prefix, by the names of an objective.

    Attributes:
        prefix: in the file.
        tensors: those of the backbone as ``backbone.``, of open_clip's text tower as ``text.``, others as they are.
        resized: names of those that were resized to the backbone's size of pictures or patches, or to three channels.
        matches: how many have a name of the backbone, and how many its shape too.
    """

    prefix: str
    tensors: dict[str, Tensor]
    resized: list[str]
    matches: tuple[int, int]


def find(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Found, list[str]]:
    """What lies below the prefix with most of a backbone, and the other prefixes with as much.

    Of such the weights that were averaged (a teacher's, an EMA) come before those that were trained, then the first.

    Args:
        backbone: perhaps on torch's meta device.
        tensors: as a file names them.
    """
    own = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    sizes = Counter(name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name))
    prefixes = [prefix for prefix, size in sizes.items() if size >= len(own) / 10]  # fewer are no backbone
    found = [_below(prefix, backbone, own, tensors) for prefix in ("", *prefixes)]
    most = max(one.matches for one in found)
    best = [one for one in found if one.matches == most]
    # The outer of two has heads and text tower besides, and in a checkpoint of ours it is the student.
    outer = [one for one in best if not any(one.prefix.startswith(o.prefix) for o in best if o is not one)]
    outer.sort(key=lambda one: not _AVERAGED.search(one.prefix))
    return outer[0], [one.prefix for one in outer[1:]]


def _below(prefix: str, backbone: nn.Module, own: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> Found:
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if "class_embedding" in below:  # the image tower of open_clip alone
        below = {f"visual.{name}": tensor for name, tensor in below.items()}
    is_clip = any(name.startswith("visual.") for name in below)
    is_bare = not is_clip and not any(name.startswith("backbone.") for name in below)
    trunk: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in below.items():
        if name == "visual.head.proj.weight":
            rest["image_projection.weight"] = tensor
        elif name == "visual.proj":  # (width, dim), not a Linear's weight
            rest["image_projection.weight"] = tensor.T
        elif name.startswith(("visual.trunk.", "backbone.")):
            trunk[re.sub(r"^(visual\.trunk|backbone)\.", "", name)] = tensor
        elif is_bare or name.startswith("visual."):  # by which timm's filter knows a ViT of open_clip
            trunk[name] = tensor
        else:
            rest[f"text.{name}" if is_clip and name.startswith(_TEXT_TOWER) else name] = tensor
    if {"visual.class_embedding", "visual.positional_embedding"} <= trunk.keys():
        trunk = _with_own_parts(trunk, backbone, own)
    there = _converted(trunk, backbone, own)
    read = {tensor.untyped_storage().data_ptr() for tensor in trunk.values()}
    common = there.keys() & own.keys()
    return Found(
        prefix,
        {f"backbone.{name}": tensor for name, tensor in there.items()} | rest,
        # A tensor that was only renamed, turned or cut still lies where it was read.
        [
            f"backbone.{name}"
            for name in common
            if there[name].untyped_storage().data_ptr() not in read
            and (name not in trunk or there[name].numel() != trunk[name].numel())
        ],
        (len(common), sum(there[name].shape == own[name] for name in common)),
    )


def _with_own_parts(trunk: dict[str, Tensor], backbone: Any, own: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A ViT by open_clip's names that computes the same with what the backbone has and open_clip has not."""
    last = "fc_norm" if "fc_norm.weight" in own and "norm.weight" not in own else "ln_post"
    trunk = {
        name.replace(".ls_", ".ls").replace("visual.ln_post", f"visual.{last}"): part for name, part in trunk.items()
    }
    if (bias := "patch_embed.proj.bias") in own:
        trunk[f"visual.{bias}"] = torch.zeros(own[bias])
    if getattr(backbone, "no_embed_class", False):
        table = trunk["visual.positional_embedding"]
        trunk["visual.class_embedding"] = trunk["visual.class_embedding"] + table[0]
        trunk["visual.positional_embedding"] = table[1:]
    return trunk


def _converted(trunk: dict[str, Tensor], backbone: nn.Module, own: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors of a backbone by timm's names, at the size of its pictures; none where timm cannot do it."""
    if "conv_proj.weight" in trunk:
        for pattern, name in _VIT_OF_TORCHVISION.items():
            trunk = {re.sub(pattern, name, old): tensor for old, tensor in trunk.items()}
    elif any(name.startswith("features.0.") for name in trunk.keys() - own.keys()):
        trunk = _in_order(trunk, own)
    elif not any(name[0].isdecimal() for name in own):  # nn.Sequential(*model.children()), as lightly's users write
        children = {str(number): name for number, (name, _) in enumerate(backbone.named_children())}
        parts = {name: name.partition(".") for name in trunk}
        trunk = {"".join((children.get(first, first), *rest)): trunk[name] for name, (first, *rest) in parts.items()}
    module = inspect.getmodule(type(backbone))
    convert = next((getattr(module, name) for name in _FILTERS if hasattr(module, name)), None)
    if convert is not None:
        takes_model = len(inspect.signature(convert).parameters) > 1
        try:
            trunk = convert(dict(trunk), backbone) if takes_model else convert(dict(trunk))
        except REFUSALS:  # tensors of something else
            return {}
    for name, tensor in trunk.items():  # grey pictures are read as three equal channels
        if name in own and tensor.ndim == 4 and tensor.shape[1] == 1 and own[name][1:2] == (3,):
            trunk[name] = tensor.expand(-1, 3, -1, -1) / 3
    return trunk


def _in_order(trunk: dict[str, Tensor], own: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors by own names, those of a shape in their order; as they are, where as many of each shape are not there.

    Torchvision numbers the layers of ConvNeXt, Swin, EfficientNet and MobileNet, which both register as they follow.
    """
    groups: list[dict[tuple[int, ...], list[str]]] = [{}, {}]
    for group, shapes in zip(groups, ({name: tensor.shape for name, tensor in trunk.items()}, own), strict=True):
        for name, shape in shapes.items():
            group.setdefault(tuple(size for size in shape if size > 1), []).append(name)
    theirs, ours = groups
    if any(len(names) != len(theirs.get(shape, ())) for shape, names in ours.items()):
        return trunk
    placed = {
        new: trunk[old].reshape(own[new])
        for shape, names in ours.items()
        for new, old in zip(names, theirs[shape], strict=True)
    }
    return placed | {name: trunk[name] for shape, names in theirs.items() if shape not in ours for name in names}
