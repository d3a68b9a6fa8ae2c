"""Start from other weights: checkpoints and exports of ours and of other libraries, open_clip's and timm's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from repr.hub import fetching
from repr.runs.weight_files import read_tensors
from repr.runs.weight_names import find

# What lies outside the towers maps to a space that the new run may choose anew: of another width it starts afresh, as
# in the CUAXU recipe. So does the projection that open_clip keeps inside the text tower.
_HEADS = ("text.text_projection", "text.text_projection.weight")
_TOLERANCE = 0.1  # share of a tower's names that may differ, such as a norm after pooling; LayerScale is a seventh
# Backbones that are told where one of them fits, by what a name of their kind ends with.
_COMMON = {
    "0.conv1.weight": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
    "0.attn.qkv.weight": (
        *("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch32_224"),
        *("vit_small_patch14_dinov2", "vit_base_patch14_dinov2"),
    ),
}


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a source and of a module.

    Attributes:
        source: where the tensors came from.
        used: names in the module that were loaded.
        resized: those of them that had to be resized (position tables, patches, the layer that reads pictures).
        missing: names in the module that keep their initial values; none of a teacher, which starts as the student.
        unused: names in the source, below ``prefix``, that the module has no place for.
        prefix: under which they lie in the source.
        others: prefixes under which as much of the backbone lies, such as that of a student.
    """

    source: str
    used: list[str]
    resized: list[str]
    missing: list[str]
    unused: list[str]
    prefix: str = ""
    others: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f" under '{self.prefix}'" if self.prefix else ""
        where += f" (and not {_shortened(self.others)})" if self.others else ""
        parts = [f"init_from {self.source}: {len(self.used)} tensors used{where}"]
        for label, names in (
            ("resized", self.resized),
            ("left as initialised", self.missing),
            ("not needed", self.unused),
        ):
            if names:
                parts.append(f"{len(names)} {label} ({_shortened(names)})")
        return ", ".join(parts)


def load_weights(module: nn.Module, source: str) -> LoadReport:
    """Load what fits from ``source`` into an objective.

    Args:
        module: an objective with ``backbone`` and perhaps ``image_projection``, ``text``, ``logit_scale``.
        source: a file or folder as :func:`repr.runs.weight_files.read_tensors` takes it, perhaps after
            ``timm:local-dir:`` or ``open_clip:local-dir:``; ``open_clip:NAME/TAG`` (TAG is a tag of open_clip or the
            path of a local file), or ``timm:NAME``.

    Returns:
        Names of the tensors that were used, resized, missing and not needed.

    Raises:
        ValueError: the source cannot be read, or it holds another architecture.
        ConnectionError: it cannot be fetched.
    """
    own = module.state_dict()
    if not any(name.startswith("backbone.") for name in own):
        raise ValueError(
            f"init_from={source}: {type(module).__name__} reads no pictures, so there is no encoder to load"
        )
    tensors = _read(source)
    backbone: Any = module.backbone
    found, others = find(backbone, tensors)
    there = found.tensors
    resized = [*found.resized, *_fit_length(own, there)]
    hint = "Set backbone and text to those it was made with"
    if fault := _fault(own, there, "backbone."):
        fitting = _fitting(tensors)
        raise ValueError(
            f"init_from={source} is of another architecture: {fault}. "
            f"{f'It fits backbone.name={fitting}' if fitting else hint}"
        )
    if fault := _fault(own, there, "text."):
        raise ValueError(f"init_from={source} is of another architecture: {fault}. {hint}")
    used = sorted(name for name in there.keys() & own.keys() if there[name].shape == own[name].shape)
    module.load_state_dict({name: there[name] for name in used}, strict=False)
    return LoadReport(
        source,
        used,
        sorted(set(resized) & set(used)),
        sorted(name for name in _weights(own) - set(used) if not name.startswith("teacher.")),
        sorted(there.keys() - own.keys()),
        found.prefix,
        others,
    )


def _read(source: str) -> dict[str, Tensor]:
    """Tensors of a source under the names that they have there."""
    kind, _, rest = source.partition(":")
    if kind not in ("open_clip", "timm"):
        return read_tensors(Path(source), "init_from")
    if rest.startswith("local-dir:"):
        return read_tensors(Path(rest.removeprefix("local-dir:")), "init_from")
    if kind == "open_clip":
        return dict(open_clip_model(rest, "init_from").state_dict())
    if not timm.is_model(rest):
        raise ValueError(f"init_from=timm:{rest}: timm has no such model")
    with fetching(f"init_from={source}"):
        return dict(timm.create_model(rest, pretrained=True, num_classes=0).state_dict())


def open_clip_model(name_and_tag: str, option: str) -> nn.Module:
    """An open_clip model with its weights.

    Args:
        name_and_tag: ``NAME/TAG``; TAG is a tag of open_clip or the path of a local file.
        option: where it was named, for errors.

    Raises:
        ValueError: open_clip has no such model, or the tag is missing.
        ConnectionError: the weights cannot be fetched.
    """
    import open_clip

    name, _, tag = name_and_tag.partition("/")
    if name not in open_clip.list_models():
        raise ValueError(f"{option}=open_clip:{name_and_tag}: open_clip has no model '{name}'")
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"{option}=open_clip:{name} needs a tag: open_clip:{name}/TAG with TAG of {tags}")
    with fetching(f"{option}=open_clip:{name_and_tag}"):
        return open_clip.create_model(name, pretrained=tag)


def _fit_length(own: Mapping[str, Tensor], there: dict[str, Tensor]) -> list[str]:
    """Bring the text's positions to the module's length. It reads from left to right: early positions stay valid."""
    name = "text.positional_embedding"
    if name not in own or name not in there or len(own[name]) == len(there[name]):
        return []
    length = min(len(own[name]), len(there[name]))
    if own[name].shape[1:] == there[name].shape[1:]:
        there[name] = torch.cat([there[name][:length].to(own[name]), own[name][length:]])
    return [name]


def _fault(own: Mapping[str, Tensor], there: Mapping[str, Tensor], tower: str) -> str | None:
    """Why the tensors of a source are not those of a tower; a source may have no text tower."""
    mine, given = ({name for name in _weights(names) if name.startswith(tower)} for names in (own, there))
    common = mine & given
    if not common and tower == "text.":
        return None
    wrong = sorted(name for name in common - set(_HEADS) if own[name].shape != there[name].shape)
    if wrong:
        return f"'{wrong[0]}' has shape {tuple(there[wrong[0]].shape)} there and {tuple(own[wrong[0]].shape)} here"
    parts = {name.split(".")[1] for name in mine}  # others, such as a classifier, are not needed
    faults = {"lacks": mine - given, "has as well": {name for name in given - mine if name.split(".")[1] in parts}}
    if sum(map(len, faults.values())) <= _TOLERANCE * len(mine):
        return None
    if not common:
        return f"it has no tensor of the backbone, such as '{min(mine)}', by this name or one that timm knows"
    return " and ".join(
        f"it {has} {len(names)} ({_shortened(sorted(names))})" for has, names in faults.items() if names
    )


def _weights(names: Mapping[str, Tensor]) -> set[str]:
    """All but the counters of BatchNorm, which nothing reads."""
    return {name for name in names if not name.endswith(".num_batches_tracked")}


def _fitting(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a common backbone that a file was made with."""
    for name in (name for end, kind in _COMMON.items() if any(key.endswith(end) for key in tensors) for name in kind):
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            backbone = timm.create_model(name, num_classes=0)
        found, _ = find(backbone, tensors)
        own = {f"backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}
        patches = "backbone.patch_embed.proj.weight"  # resized, they fit any
        if patches not in found.resized and _fault(own, found.tensors, "backbone.") is None:
            return name
    return None


def _shortened(names: Sequence[str]) -> str:
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])
