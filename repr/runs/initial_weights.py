"""Start from other weights: a checkpoint of ours, an open_clip model, or a timm model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import broken, last_checkpoint

# What lies outside the towers maps to a space that the new run may choose anew: of another width it starts afresh, as
# in the CUAXU recipe. So does the projection that open_clip keeps inside the text tower.
_HEADS = ("text.text_projection", "text.text_projection.weight")
_TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a source and of a module.

    Attributes:
        source: where the tensors came from.
        used: names in the module that were loaded.
        resized: those of them that had to be resized (position tables).
        missing: names in the module that keep their initial values.
        unused: names in the source that the module has no place for.
    """

    source: str
    used: list[str]
    resized: list[str]
    missing: list[str]
    unused: list[str]

    def __str__(self) -> str:
        parts = [f"init_from {self.source}: {len(self.used)} tensors used"]
        for label, names in (
            ("resized", self.resized),
            ("left as initialised", self.missing),
            ("not needed", self.unused),
        ):
            if names:
                parts.append(f"{len(names)} {label} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
        return ", ".join(parts)


def load_weights(module: nn.Module, source: str) -> LoadReport:
    """Load what fits from ``source`` into an objective.

    Args:
        module: an objective with ``backbone`` and perhaps ``image_projection``, ``text``, ``logit_scale``.
        source: a checkpoint file or run folder of ours, ``open_clip:NAME/TAG`` (TAG is a tag of open_clip or the
            path of a local file), or ``timm:NAME``.

    Returns:
        Names of the tensors that were used, resized, missing and not needed.

    Raises:
        ValueError: the source does not exist, or it holds another architecture.
    """
    tensors = _read(source)
    resized = _fit_positions(module, tensors)
    own = module.state_dict()
    unused = sorted(tensors.keys() - own.keys())
    wrong = {name for name in tensors.keys() & own.keys() if tensors[name].shape != own[name].shape}
    used = sorted(tensors.keys() & own.keys() - wrong)
    if not (trunk := [name for name in own if name.startswith("backbone.")]):
        raise ValueError(
            f"init_from={source}: {type(module).__name__} reads no pictures, so there is no encoder to load"
        )
    towers = {name for name in wrong if name.startswith(("backbone.", "text."))}
    if (strange := sorted(towers - set(_HEADS))) or not set(trunk) & set(used):
        example = (
            f"'{strange[0]}' has shape {tuple(tensors[strange[0]].shape)} there and {tuple(own[strange[0]].shape)} here"
            if strange
            else f"it has no tensor of the backbone, such as '{trunk[0]}'"
        )
        raise ValueError(
            f"init_from={source} is of another architecture: {example}. Set backbone and text to those it was made with"
        )
    module.load_state_dict({name: tensors[name] for name in used}, strict=False)
    return LoadReport(source, used, sorted(set(resized) & set(used)), sorted(own.keys() - set(used)), unused)


def _read(source: str) -> dict[str, Tensor]:
    """Tensors of a source under the names that our objectives use."""
    kind, _, rest = source.partition(":")
    if kind == "open_clip":
        return _read_open_clip(rest)
    if kind == "timm":
        import timm

        if not timm.is_model(rest):
            raise ValueError(f"init_from=timm:{rest}: timm has no such model")
        model = timm.create_model(rest, pretrained=True, num_classes=0)
        return {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    path = Path(source)
    if path.is_dir() and path.suffix != ".ckpt":
        if (last := last_checkpoint(path)) is None:
            raise ValueError(f"init_from={source} is a folder without checkpoints/step=*.ckpt")
        path = last
    if not path.exists():
        raise ValueError(f"init_from={source} does not exist; give a checkpoint, open_clip:NAME/TAG or timm:NAME")
    if path.suffix == ".ckpt" and (fault := broken(path)):
        raise ValueError(f"init_from={source} is damaged ({fault}); give another checkpoint")
    content = read_checkpoint(path, optimizer=False)
    return dict(content.get("state_dict", content))


def open_clip_model(name_and_tag: str, option: str) -> nn.Module:
    """An open_clip model with its weights.

    Args:
        name_and_tag: ``NAME/TAG``; TAG is a tag of open_clip or the path of a local file.
        option: where it was named, for errors.

    Raises:
        ValueError: open_clip has no such model, or the tag is missing.
    """
    import open_clip

    name, _, tag = name_and_tag.partition("/")
    if name not in open_clip.list_models():
        raise ValueError(f"{option}=open_clip:{name_and_tag}: open_clip has no model '{name}'")
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"{option}=open_clip:{name} needs a tag: open_clip:{name}/TAG with TAG of {tags}")
    return open_clip.create_model(name, pretrained=tag)


def _read_open_clip(name_and_tag: str) -> dict[str, Tensor]:
    tensors = open_clip_model(name_and_tag, "init_from").state_dict()
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == "visual.head.proj.weight":
            renamed["image_projection.weight"] = tensor
        elif key == "visual.proj":  # (width, dim), not a Linear's weight
            renamed["image_projection.weight"] = tensor.T
        elif key.startswith("visual.trunk."):
            renamed[key.replace("visual.trunk.", "backbone.", 1)] = tensor
        elif key.startswith(_TEXT_TOWER):
            renamed[f"text.{key}"] = tensor
        else:
            renamed[key] = tensor
    return renamed


def _fit_positions(module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Bring the backbone's tensors to the module's names and grid, and cut a longer text to the module's length."""
    own = module.state_dict()
    resized = []
    native = {name: tensors.pop(name) for name in list(tensors) if name.startswith("visual.")}
    trunk = {
        name.removeprefix("backbone."): tensors.pop(name) for name in list(tensors) if name.startswith("backbone.")
    }
    convert = getattr(inspect.getmodule(type(module.backbone)), "checkpoint_filter_fn", None)
    if (native or trunk) and convert is not None:
        old = trunk.get("pos_embed", native.get("visual.positional_embedding"))
        trunk = convert(native or trunk, module.backbone)
        trunk.pop("head.weight", None), trunk.pop("head.bias", None)
        if old is not None and "pos_embed" in trunk and trunk["pos_embed"].shape[-2] != old.shape[-2]:
            resized.append("backbone.pos_embed")
    tensors |= {f"backbone.{name}": tensor for name, tensor in (trunk or native).items()}
    name = "text.positional_embedding"
    if name in tensors and name in own and len(tensors[name]) > len(own[name]):
        tensors[name] = tensors[name][: len(own[name])]  # the text reads from left to right: early positions stay valid
        resized.append(name)
    return resized
