"""The stages beside this file as one encoder: ``model, preprocess, tokenizer = load()``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize


class Joined(torch.nn.Module):
    """The outputs of all stages side by side, at unit length: (B, sum of their widths)."""

    def __init__(self, stages: list[Any], norm: str) -> None:
        super().__init__()
        self.stages, self.norm = torch.nn.ModuleList(stages), norm

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self._join("encode_image", images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B, D)."""
        return self._join("encode_text", tokens)

    def _join(self, method: str, inputs: torch.Tensor) -> torch.Tensor:
        parts = [getattr(stage, method, stage)(inputs) for stage in self.stages]  # timm's models are called themselves
        parts = [normalize(part, dim=-1) for part in parts] if self.norm == "each" else parts
        return normalize(torch.cat(parts, dim=-1), dim=-1)


def load(folder: str | Path = Path(__file__).parent) -> tuple[Joined, Any, Any]:
    """Read the stages: model, transform of a PIL picture, tokenizer (None without trained text towers)."""
    manifest = json.loads((Path(folder) / "stages.json").read_text(encoding="utf-8"))
    stages: list[Any] = []
    transform = tokenizer = None
    for stage in manifest["stages"]:
        path, tower = Path(folder) / stage["folder"], stage.get("image_tower")
        if stage["to"] == "timm":
            import timm

            stages.append(timm.create_model(f"local-dir:{path}", pretrained=True).eval())
            transform = timm.data.create_transform(**timm.data.resolve_model_data_config(stages[-1]))
        else:
            import open_clip

            name, weights = f"local-dir:{path}", str(path / tower) if tower else None
            model, _, transform = open_clip.create_model_and_transforms(name, pretrained_image_path=weights)
            stages.append(model.eval())
            tokenizer = None if tower else open_clip.get_tokenizer(name)
    return Joined(stages, manifest["norm"]), transform, tokenizer
