"""A captioner as the CoCa model that open_clip builds from a config."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.config import ConfigError
from repr.export import native_vit
from repr.export.target import Answers
from repr.objectives.captioner import Captioner
from repr.runs.trained import Trained


def is_coca(trained: Trained) -> bool:
    """Whether an objective has the towers and the decoder of CoCa."""
    return isinstance(trained.objective, Captioner) and trained.has_text


def model(trained: Trained, text_cfg: dict[str, Any], quick_gelu: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the whole model.

    Raises:
        ConfigError: open_clip cannot express it.
    """
    flow = trained.objective
    pooler, text, decoder = flow.pooler, flow.text, flow.decoder
    vision_cfg = native_vit.vision_cfg(flow.backbone, trained.cfg.data.image_size, pooler=pooler)
    told = f"open_clip {open_clip.__version__} cannot express {trained.name} as a CoCa model"
    if pooler is not None and pooler.kind != "shared":
        raise ConfigError([f"{told}: its models of two poolers have no embedding. Train with objective.pooler=shared"])
    if pooler is not None and text.output_dim != text.width:
        widths = f"embed_dim={text.output_dim} and text.width={text.width}"
        raise ConfigError([f"{told}: {widths}, and it has one for both. Train with equal ones"])
    if vision_cfg is None or not isinstance(getattr(flow, "image_map", nn.Identity()), nn.Identity):
        advice = "with backbone.final_norm=false where objective.pooler=shared, else as wide as the text tower"
        raise ConfigError([f"{told}: the backbone is to be a ViT, {advice}. Or export with to=timm or to=onnx"])
    config = {
        "embed_dim": text.output_dim,
        "vision_cfg": vision_cfg | {"output_tokens": True},
        "text_cfg": text_cfg,
        "multimodal_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": decoder.num_heads,
            "layers": len(decoder.resblocks),
        },
        "quick_gelu": quick_gelu,
        "custom_text": True,
    }
    if flow.logit_bias is not None:
        config["init_logit_bias"] = float(flow.logit_bias)
    parts = {
        "visual": native_vit.visual_tensors(flow.backbone, flow.image_projection.weight, pooler),
        "text": text.state_dict(),
        "text_decoder": {name: tensor for name, tensor in decoder.state_dict().items() if name != "blanks"}
        | {"text_projection": flow.head.weight},
    }
    tensors = {f"{part}.{name}": tensor for part, some in parts.items() for name, tensor in some.items()}
    scalars = {name: getattr(flow, name) for name in ("logit_scale", "logit_bias")}
    return config, tensors | {name: scalar.detach() for name, scalar in scalars.items() if scalar is not None}


@torch.inference_mode()
def answers(trained: Trained, ours: Answers) -> Answers:
    """As open_clip gives them: unit embeddings, and ``logits`` of every word of the captions, one for each picture."""
    flow, tokens = trained.objective, ours["tokens"]
    *_, seen = flow.see(ours["pixels"])
    logits = flow.head(flow.decoder(seen, flow.read(tokens)[1][:, :-1]))
    units = {name: F.normalize(ours[name], dim=1) for name in ("image", "text")}
    return {**ours, **units, "logits": logits}
