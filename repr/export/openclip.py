"""Towers as a folder for open_clip: ``open_clip.create_model_and_transforms('local-dir:DIR')``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from open_clip.model import CLIPTextCfg, CustomTextCLIP
from open_clip.transformer import QuickGELU, TextTransformer
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn

from repr.config import ConfigError
from repr.export import coca, native_vit
from repr.export.target import Answers, Loaded, Samples, Target, our_answers
from repr.export.timm_trunk import pooling, timm_call, write_json, write_tensors
from repr.export.verify import difference
from repr.runs.trained import Trained

# Below the folder, since open_clip takes a file inside it for a whole model.
IMAGE_TOWER = "image_tower/open_clip_visual.safetensors"

Tower = tuple[dict[str, Any], dict[str, Tensor]]  # config of a model, tensors of its image tower


def write(
    trained: Trained, folder: Path, samples: Samples, *, untrained_text: bool = False
) -> tuple[dict[str, Any], Answers]:
    """Write ``open_clip_config.json`` and the tensors; see :class:`repr.export.target.Target`.

    An image-text objective gives ``open_clip_model.safetensors``, a captioner that of a CoCa model. One of images alone
    gives the image tower for ``pretrained_image_path``; with ``untrained_text`` it gives a whole model whose text tower
    has random weights.

    Raises:
        ConfigError: open_clip has no such tower or tokenizer.
    """
    if untrained_text and trained.has_text:
        raise ConfigError([f"untrained_text=true: {trained.name} has a trained text tower; leave it out"])
    told = text_cfg(trained)  # for its errors, before anything is computed
    ours: Answers = our_answers(trained, samples)
    data = trained.cfg.data
    if coca.is_coca(trained):
        model_cfg, tensors = coca.model(trained, *told)
        ours = coca.answers(trained, ours)
    else:
        model_cfg, tensors = _image_tower(trained, ours)
    preprocess_cfg = {"mean": [*data.mean], "std": [*data.std], "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, folder / "open_clip_config.json")
    if not trained.has_text and not untrained_text:
        (folder / IMAGE_TOWER).parent.mkdir()
        write_tensors(tensors, folder / IMAGE_TOWER)
        return {"image_tower": IMAGE_TOWER}, ours
    if not coca.is_coca(trained):
        others = _text_tensors(trained, model_cfg["embed_dim"]) if trained.has_text else _built(model_cfg).state_dict()
        tensors = others | {f"visual.{key}": tensor for key, tensor in tensors.items()}
    write_tensors(tensors, folder / "open_clip_model.safetensors")
    return {}, ours


def load(folder: str, image_tower: str | None = None, **where: Any) -> Loaded:
    """Read a whole model, or one whose image tower is a file of its own below the folder.

    Where ``where`` is given, ``folder`` is a name on the hub.
    """
    import open_clip

    name = folder if where else f"local-dir:{folder}"
    tower = image_tower and f"{folder}/{image_tower}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_image_path=tower, **where)
    return model.eval(), preprocess, open_clip.get_tokenizer(name, **where)


TARGET = Target(write, load)


def _image_tower(trained: Trained, ours: Answers) -> Tower:
    """The first of the ways to say it to open_clip that gives our embeddings; where none does, all faults are told."""
    name, options = timm_call(trained)
    usual: Any = get_pretrained_cfg_value(name, "input_size")
    faults = []
    for model_cfg, tensors in _candidates(trained, ours["image"].shape[1]):
        if "timm_model_name" in model_cfg["vision_cfg"] and options.get("img_size", usual[-1]) != usual[-1]:
            faults.append(f"{name} is built for {usual[-2]} x {usual[-1]} pixels")
            continue
        visual = _built(model_cfg).visual
        try:
            visual.load_state_dict(tensors)
        except RuntimeError as error:
            faults.append(str(error).splitlines()[1].strip())
            continue
        with torch.inference_mode():
            fault = difference({"embedding": visual.eval()(ours["pixels"])}, {"embedding": ours["image"]})
        if fault is None:
            return model_cfg, tensors
        faults.append(fault)
    told = ", ".join(f"{key}={value}" for key, value in options.items()) or "no arguments"
    fault = (
        f"open_clip {open_clip.__version__} cannot express the backbone of {trained.name}: it makes timm's {name} by "
        f"name alone, here with {told}, and this is none of its own ViTs ({'; '.join(dict.fromkeys(faults))}). "
        "Export it with to=timm"
    )
    raise ConfigError([fault])


def _candidates(trained: Trained, dim: int) -> Iterator[Tower]:
    """By timm's name, then as open_clip's own ViT, whose activation is also the text tower's."""
    objective, size = trained.objective, trained.cfg.data.image_size
    told, quick_gelu = text_cfg(trained)
    config: dict[str, Any] = {"embed_dim": dim, "text_cfg": told, "quick_gelu": quick_gelu, "custom_text": True}
    if getattr(objective, "logit_bias", None) is not None:
        config["init_logit_bias"] = float(objective.logit_bias)
    name, options = timm_call(trained)
    projection = getattr(objective, "image_projection", None)
    if not isinstance(projection, torch.nn.Linear | None):
        raise ConfigError(["open_clip has no model with an MLP on its towers (hidden_dim): export it with to=timm"])
    by_name = {
        "timm_model_name": name,
        "timm_pool": pooling(objective.backbone) if projection is None else options.get("global_pool", ""),
        "timm_proj": "none" if projection is None else "linear",
        "timm_proj_bias": projection is not None and projection.bias is not None,
        "image_size": size,
    }
    tensors = {f"trunk.{key}": tensor for key, tensor in objective.backbone.state_dict().items()}
    if projection is not None:
        tensors |= {f"head.proj.{key}": tensor for key, tensor in projection.state_dict().items()}
    yield config | {"vision_cfg": by_name}, tensors
    own = native_vit.vision_cfg(objective.backbone, size)
    if own is None or (projection is not None and projection.bias is not None):
        return
    renamed = native_vit.visual_tensors(objective.backbone, None if projection is None else projection.weight)
    for quick in [quick_gelu] if trained.has_text else [False, True]:
        yield config | {"vision_cfg": own, "quick_gelu": quick}, renamed


def _built(model_cfg: dict[str, Any]) -> Any:
    """A model of open_clip with random weights, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CustomTextCLIP(**{key: value for key, value in model_cfg.items() if key != "custom_text"})


def _text_tensors(trained: Trained, embed_dim: int) -> dict[str, Tensor]:
    """The text tower, temperature and bias; a tower of another width than that of the images is refused."""
    objective = trained.objective
    if (width := objective.text.output_dim) != embed_dim:
        fault = f"open_clip has one space for images and texts, and those of {trained.name} are {embed_dim} and {width}"
        raise ConfigError([f"{fault} wide. Export the image tower with to=timm, or both with to=onnx"])
    tensors = {f"text.{key}": tensor for key, tensor in objective.text.state_dict().items()}
    scalars = {key: getattr(objective, key, None) for key in ("logit_scale", "logit_bias")}
    tensors |= {key: tensor.detach() for key, tensor in scalars.items() if tensor is not None}
    # A flow without temperature of its own has none to export, and open_clip's must have a value: that of a new model.
    return {"logit_scale": torch.tensor(math.log(1 / 0.07)), **tensors}


def text_cfg(trained: Trained) -> tuple[dict[str, Any], bool]:
    """open_clip's ``text_cfg`` and whether the activation is QuickGELU; an image objective's is that of its config.

    Raises:
        ConfigError: open_clip cannot be told so.
    """
    options = _options(trained, "text", trained.cfg.objective.get("text") or trained.cfg.text, "TextTransformer")
    options.pop("output_dim", None)
    if not trained.has_text:  # that of a captioner without an embedding of texts, which is not exported
        options.pop("output_tokens", None)
    activation = options.pop("act_layer", None)
    activation = nn.GELU if activation is None else instantiate(activation)
    known = {field.name for field in fields(CLIPTextCfg)}
    defaults = {name: parameter.default for name, parameter in inspect.signature(TextTransformer).parameters.items()}
    unknown = {key: value for key, value in options.items() if key not in known and value != defaults.get(key)}
    if activation not in (nn.GELU, QuickGELU):
        unknown["act_layer"] = activation
    if unknown:
        told = ", ".join(f"text.{key}={value}" for key, value in unknown.items())
        raise ConfigError([f"open_clip {open_clip.__version__} cannot express {told} of {trained.name}"])
    config = {key: value for key, value in options.items() if key in known}
    if tokenizer := tokenizer_options(trained, options["context_length"]):
        config["tokenizer_kwargs"] = tokenizer
    return config, activation is QuickGELU


def tokenizer_options(trained: Trained, context_length: int) -> dict[str, Any]:
    """The arguments of open_clip's SimpleTokenizer beside the length; none where there is no tokenizer.

    Raises:
        ConfigError: it is another tokenizer, or gives texts of another length than the tower's.
    """
    node = trained.cfg.get("tokenizer")
    options = {} if node is None else _options(trained, "tokenizer", node, "SimpleTokenizer")
    length = options.pop("context_length", context_length)
    if length != context_length:
        fault = f"tokenizer.context_length={length} is not text.context_length={context_length}"
        raise ConfigError([f"{trained.name}: {fault}"])
    return options


def _options(trained: Trained, part: str, node: DictConfig, class_name: str) -> dict[str, Any]:
    """The arguments of a class of open_clip in a config; any other class is refused."""
    target = str(node.get("_target_"))
    if not (target.startswith("open_clip.") and target.endswith(class_name)):
        elsewhere = "; to=onnx writes both towers, to=timm that of pictures" if part == "text" else ""
        fault = f"{trained.name}: {part} is {target}; only open_clip's {class_name} can be exported{elsewhere}"
        raise ConfigError([fault])
    options: Any = OmegaConf.to_container(node, resolve=True)
    return {key: value for key, value in options.items() if not key.startswith("_")}
