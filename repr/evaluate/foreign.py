"""Encoders of open_clip and timm as they are: with their own transform and tokenizer, embedded like an objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repr.batch import Batch, Embeddings
from repr.evaluate.encoder import Encoder, set_size, size_fault
from repr.hub import fetching

HINT = "give a run folder, a checkpoint, open_clip:NAME/TAG, open_clip:local-dir:PATH, timm:NAME or timm:local-dir:PATH"
LOCAL = "local-dir:"


class Towers(nn.Module):
    """An open_clip model, or a timm backbone alone, that embeds evaluation batches.

    ``backbone`` is the image tower where that is one of timm's, so that feature maps can be taken.
    """

    def __init__(self, model: nn.Module | None, backbone: nn.Module | None) -> None:
        super().__init__()
        self.model: Any = model
        self.backbone = backbone

    def embed(self, batch: Batch) -> Embeddings:
        """``image`` (B, D) as the library gives it, and ``trunk`` (B, T): what is pooled, before any projection."""
        images, model = batch["image"], self.model
        if self.backbone is not None:  # in open_clip's wrapper, pooling may follow, and then projection
            image = trunk = self.backbone(images)
            for name, layer in () if model is None else model.visual.head.named_children():
                image = layer(image)
                trunk = image if name == "pool" else trunk
            return Embeddings(image=image, trunk=trunk)
        if (projection := getattr(model.visual, "proj", None)) is None:
            pooled = model.encode_image(images)  # a ResNet of CLIP projects while it pools
            return Embeddings(image=pooled, trunk=pooled)
        model.visual.proj = None  # one pass gives both
        try:
            pooled = model.encode_image(images)
        finally:
            model.visual.proj = projection
        return Embeddings(image=pooled @ projection, trunk=pooled)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return self.model.encode_text(tokens)


def read_foreign(name: str, image_size: int | None = None) -> Encoder:
    """Read a model of open_clip or timm with its weights, transform and tokenizer.

    The network is used where the name is one of pretrained weights, and not for ``local-dir:`` and names without.

    Args:
        name: ``open_clip:NAME/TAG`` (TAG is a tag or a file; without one the weights are random),
            ``open_clip:local-dir:PATH``, ``timm:NAME`` or ``timm:local-dir:PATH``.
        image_size: side in pixels; None: the model's own.

    Raises:
        ValueError: there is no such model, or it cannot take pictures of that size.
    """
    kind, _, rest = name.partition(":")
    if kind not in ("open_clip", "timm") or not rest:
        raise ValueError(f"model={name} does not exist; {HINT}")
    folder = Path(rest.removeprefix(LOCAL)) if rest.startswith(LOCAL) else None
    if folder is not None:
        file = {"open_clip": "open_clip_config.json", "timm": "config.json"}[kind]
        if not folder.is_dir():
            raise ValueError(f"model={name}: {folder} is no folder; {HINT}")
        if not (folder / file).is_file():
            raise ValueError(f"model={name}: the folder has no {file}; {HINT}")
    return (_open_clip if kind == "open_clip" else _timm)(name, rest, folder, image_size)


def _open_clip(name: str, rest: str, folder: Path | None, image_size: int | None) -> Encoder:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if folder is None:
        architecture, _, tag = rest.partition("/")
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"model={name}: open_clip has no model '{architecture}'; open_clip.list_models() lists them"
            )
        if tag and not Path(tag).is_file() and not open_clip.get_pretrained_cfg(architecture, tag):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise ValueError(f"model={name}: '{tag}' is no file and no tag of {architecture}; it has {tags}")
    else:
        architecture, tag = rest, ""
        if not any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in folder.iterdir()):
            raise ValueError(f"model={name}: the folder has no weights (open_clip_model.safetensors)")
    try:
        with fetching(f"model={name}"):
            model: Any = open_clip.create_model(architecture, pretrained=tag or None, force_image_size=image_size)
    except RuntimeError as error:
        if image_size is None:
            raise ValueError(f"model={name} does not load: {str(error).splitlines()[0]}") from error
        raise ValueError(size_fault(name, image_size, error)) from error
    cfg = PreprocessCfg(**model.visual.preprocess_cfg)
    size = cfg.size if isinstance(cfg.size, int) else cfg.size[0]
    module = Towers(model.eval(), getattr(model.visual, "trunk", None))
    set_size(module, size, name)
    resize, crop = {
        "shortest": ("shorter side to the resolution", "centre"),
        "longest": ("longer side to the resolution", "none, padded"),
        "squash": ("both sides to the resolution", "none"),
    }[cfg.resize_mode]
    return Encoder(
        module=module,
        transform=image_transform_v2(cfg, is_train=False),
        image_size=size,
        mean=cfg.mean,
        std=cfg.std,
        tokenizer=open_clip.get_tokenizer(architecture),
        resize=resize,
        crop=crop,
        interpolation="bilinear" if cfg.interpolation == "bilinear" else "bicubic",
        notes=[] if tag or folder else [f"{name} names no weights, so they are random"],
    )


def _timm(name: str, rest: str, folder: Path | None, image_size: int | None) -> Encoder:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from repr.models.backbone import backbone

    pretrained = True
    if folder is not None:
        model: Any = timm.create_model(rest, pretrained=True, num_classes=0)
    else:
        pretrained = timm.is_model(rest) and timm.models.is_model_pretrained(rest)
        model = backbone(rest, pretrained=pretrained)
    cfg = resolve_model_data_config(model)
    own = cfg["input_size"][-1]
    size = image_size or own
    module = Towers(None, model.eval())
    set_size(module, size, name, own=own)
    cfg |= {"input_size": (3, size, size)}
    whole = int(size / cfg["crop_pct"])
    resized = {"squash": f"both sides to {whole}", "border": f"longer side to {whole}"}
    return Encoder(
        module=module,
        transform=create_transform(**cfg, is_training=False),
        image_size=size,
        mean=cfg["mean"],
        std=cfg["std"],
        tokenizer=None,
        resize=resized.get(cfg["crop_mode"], f"shorter side to {whole}"),
        crop="none, padded" if cfg["crop_mode"] == "border" else "centre",
        interpolation=cfg["interpolation"],
        notes=[] if pretrained else [f"timm has no weights of {rest}, so they are random"],
    )
