"""What several flows ask of the views and the backbone of a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repr.models.backbone import refused_sizes


def view_sizes(cfg: Any) -> list[int]:
    """The sides in pixels of all views that a config draws."""
    return [view.size for view in (cfg.get("views") or {}).values() for _ in range(view.get("count", 1))]


def backbone_faults(cfg: Any, sizes: list[int]) -> Iterator[str]:
    """Whether the config's backbone takes views of several sizes; those of one size are what it was made for."""
    if len(set(sizes)) > 1 and cfg.backbone["_target_"] == "repr.models.backbone.backbone":
        options = {str(k): v for k, v in cfg.backbone.items() if k not in ("_target_", "pretrained")}
        for size, reason in refused_sizes(sorted(set(sizes)), **options).items():
            yield (
                f"backbone.name={cfg.backbone.name} cannot take views of {size} x {size} pixels ({reason}): "
                "set +backbone.dynamic_img_size=true if it is a ViT, view sizes that its patches divide, or another one"
            )
