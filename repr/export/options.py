"""What an export can be told, and what is refused before anything is read; it needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from repr.config import ConfigError

HUB = "hf"  # open_clip where text was trained, otherwise timm, with a model card
STAGED = ("open_clip", "timm", HUB)  # read by join_stages.py
TARGETS = (*STAGED, "onnx")
WEIGHTS = ("model", "teacher", "unaveraged")


def check_options(
    out: str | Path, *, to: str, weights: str, untrained_text: bool, force: bool, targets: Iterable[str] = TARGETS
) -> None:
    """Refuse options of :func:`repr.export.folders.export` that do not exist or exclude each other.

    Raises:
        ConfigError: there is one.
    """
    for option, value, known in (("to", to, dict.fromkeys(targets)), ("weights", weights, WEIGHTS)):
        if value not in known:
            *names, last = known
            raise ConfigError([f"{option}={value}; set it to {', '.join(names)} or {last}"])
    if untrained_text and to != "open_clip":
        raise ConfigError([f"untrained_text=true is for to=open_clip, not to={to}"])
    out = Path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError([f"out={out} is not a folder; choose another"])
    if out.exists() and not force:
        raise ConfigError([f"out={out} exists; choose another, or set force=true to replace it"])


def fitting_target(cfg: DictConfig) -> str | None:
    """The target that fits what a config trains: both towers where open_clip has them, else the backbone, if any.

    None: what was trained without pictures, or with another backbone than timm's, is not exported.
    """

    def target(part: str) -> str:
        return str(OmegaConf.select(cfg, f"{part}._target_"))

    if target("objective.backbone") != "repr.models.backbone.backbone":
        return None
    text, tokenizer = target("objective.text"), target("tokenizer")
    is_open_clip = text.endswith(".TextTransformer") and tokenizer == "open_clip.SimpleTokenizer"
    has_mlps = OmegaConf.select(cfg, "objective.hidden_dim") is not None
    is_coca = target("objective").endswith(".Captioner")  # which open_clip has with its own ViTs alone
    is_vit = str(OmegaConf.select(cfg, "backbone.name")).removeprefix("test_").startswith("vit")
    return "open_clip" if is_open_clip and not has_mlps and (is_vit or not is_coca) else "timm"
