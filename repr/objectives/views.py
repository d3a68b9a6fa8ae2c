"""What several flows ask of the views and the backbone of a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from repr.models.backbone import refused_sizes


def view_sizes(cfg: Any) -> list[int]:
    """The sides in pixels of all views that a config draws."""
    return [view.size for view in (cfg.get("views") or {}).values() for _ in range(view.get("count", 1))]


def backbone_faults(backbone: nn.Module, cfg: Any) -> Iterator[str]:
    """Whether a backbone takes views of several sizes; those of one size are what it was made for."""
    sizes = sorted(set(view_sizes(cfg)))
    for size, reason in refused_sizes(backbone, sizes).items() if len(sizes) > 1 else ():
        yield (
            f"backbone.name={cfg.backbone.get('name')} cannot take views of {size} x {size} pixels ({reason}): "
            "set +backbone.dynamic_img_size=true if it is a ViT, view sizes that its patches divide, or another one"
        )
