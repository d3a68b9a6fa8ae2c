"""The image backbone as a folder for timm: ``timm.create_model('local-dir:DIR', pretrained=True)``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save
from torch import Tensor

from repr.config import ConfigError
from repr.export.target import Answers, Loaded, Samples, Target, our_answers
from repr.models.backbone import takes_image_size
from repr.runs.trained import Trained


def write(trained: Trained, folder: Path, samples: Samples) -> tuple[dict[str, Any], Answers]:
    """Write ``config.json`` and ``model.safetensors``: the backbone with its arguments, and the evaluation transform.

    See :class:`repr.export.target.Target`.

    Raises:
        ConfigError: the backbone is not one that timm can make again.
    """
    data, backbone = trained.cfg.data, trained.objective.backbone
    name, options = timm_call(trained)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "global_pool": pooling(backbone),
        "model_args": options,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, data.image_size, data.image_size],
            "fixed_input_size": "img_size" in options,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": backbone.pretrained_cfg.get("first_conv"),
            "classifier": backbone.pretrained_cfg.get("classifier"),
        },
    }
    write_json(config, folder / "config.json")
    write_tensors(backbone.state_dict(), folder / "model.safetensors")
    return {}, our_answers(trained, samples, trunk=True)


def load(folder: str, **where: Any) -> Loaded:
    """Read a backbone from a folder, or by its name on the hub where ``where`` is given."""
    import timm

    model = timm.create_model(folder if where else f"local-dir:{folder}", pretrained=True, **where).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model)), None


TARGET = Target(write, load)


def timm_call(trained: Trained) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which ``timm.create_model`` makes the backbone.

    Raises:
        ConfigError: the backbone is not timm's, or an argument cannot be written as JSON.
    """
    node = trained.cfg.objective.backbone
    target = node.get("_target_")
    if target != "repr.models.backbone.backbone":
        raise ConfigError([f"{trained.name}: backbone is {target}; only repr.models.backbone.backbone can be exported"])
    resolved: Any = OmegaConf.to_container(node, resolve=True)
    options = {k: v for k, v in resolved.items() if k not in ("_target_", "name", "image_size", "pretrained")}
    for key, value in options.items():
        if isinstance(value, dict) and "_target_" in value:
            fault = f"backbone.{key} is an object, which cannot be exported; give timm's name for it"
            raise ConfigError([f"{trained.name}: {fault}"])
    if node.get("image_size") is not None and takes_image_size(node.name):
        options["img_size"] = node.image_size
    return node.name, options


def pooling(backbone: Any) -> str:
    """How timm calls the way in which a model pools its last map."""
    for holder in (backbone, getattr(backbone, "head", None)):
        pool = getattr(holder, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)  # of a module that pools
        if isinstance(pool, str):
            return pool
    return ""


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a config for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors, which know neither memory layouts nor shared memory."""
    # Not save_file, whose error on a full disk is not an OSError.
    path.write_bytes(save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, {"format": "pt"}))
