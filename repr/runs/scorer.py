"""A frozen image-text model that tells how near each patch of a picture is to its caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.models.backbone import feature_map
from repr.runs.folder import CONFIG, is_run, load_run
from repr.runs.initial_weights import load_weights, open_clip_model


@dataclass(frozen=True)
class ScorerFacts:
    """What a scorer was made for, known without its weights.

    Attributes:
        image_size: side of its pictures in pixels.
        mean: of the channels, subtracted from pixels in [0, 1].
        std: likewise.
        has_patches: whether its picture features are a mean or a token over patches that share their space.
        has_words: whether it reads CLIP's vocabulary.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    has_patches: bool
    has_words: bool


class PatchScorer:
    """Patches and captions in the space of a trained image-text model.

    It is no ``nn.Module``: its weights are not trained, and in no checkpoint of the run. Of a CLIP ViT the patch
    features are the tokens after the last norm, through the projection that CLIP applies to the class token.

    Args:
        source: ``open_clip:NAME/TAG`` (TAG is a tag of open_clip or the path of a local file), or the folder of a run
            with an image-text objective.

    Attributes:
        facts: what it was made for.

    Raises:
        ValueError: there is no such source, or it gives no patch features.
    """

    def __init__(self, source: str) -> None:
        self.facts = scorer_facts(source)
        if not self.facts.has_patches:
            raise ValueError(f"scorer={source} gives no patch features: name one with a ViT and linear projection")
        kind, _, rest = source.partition(":")
        self._model, self._features, self._context = _of_open_clip(rest) if kind == "open_clip" else _of_run(source)
        self._model.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | None) -> PatchScorer | None:
        """The scorer of a source, or None of None: what the option ``scorer`` of a config means."""
        return None if source is None else cls(source)

    @classmethod
    def config_faults(cls, cfg: Any) -> Iterator[str]:
        """A scorer that cannot be given the views of the config."""
        size = next((view.size for view in (cfg.get("views") or {}).values()), cfg.image_size)
        mean, std = cfg.data.mean, cfg.data.std
        if cfg.scorer and (fault := scorer_fault(cfg.scorer, image_size=size, mean=mean, std=std)):
            yield fault

    @torch.no_grad()
    def __call__(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            images: (B, 3, S, S), normalised as the scorer was trained.
            tokens: (B, L) int64 of CLIP's vocabulary, of any length.

        Returns:
            Features of patches (B, D, h, w), and of captions (B, D).
        """
        self._model.to(images.device)
        text = self._model.encode_text(fit_length(tokens, self._context))
        return self._features(images), text


def scorer_facts(source: str) -> ScorerFacts:
    """Read what a scorer was made for, without loading its weights.

    Args:
        source: as for :class:`PatchScorer`.

    Raises:
        ValueError: there is no such source, or it is no image-text model.
    """
    kind, _, rest = source.partition(":")
    if kind != "open_clip":
        return _run_facts(source)
    import open_clip

    name, _, tag = rest.partition("/")
    if name not in open_clip.list_models():
        raise ValueError(f"scorer={source}: open_clip has no model '{name}'")
    config = open_clip.get_model_config(name)
    vision, text, given = config["vision_cfg"], config["text_cfg"], open_clip.get_pretrained_cfg(name, tag)
    size = vision.get("image_size", 224)
    return ScorerFacts(
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(given.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(given.get("std") or open_clip.OPENAI_DATASET_STD),
        has_patches=(
            isinstance(vision.get("layers", 12), int)  # a list: CLIP's ResNets, which pool by attention
            and vision.get("timm_pool", "avg") in ("avg", "token", "")
            and not vision.get("attentional_pool")
        ),
        has_words="hf_tokenizer_name" not in text and text.get("vocab_size", 49408) == 49408,
    )


def scorer_fault(source: str, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Why a scorer cannot be given the views of a run, or None.

    Args:
        source: as for :class:`PatchScorer`.
        image_size: side of the views in pixels.
        mean: by which they are normalised.
        std: likewise.
    """
    try:
        facts = scorer_facts(source)
    except ValueError as error:
        return str(error)
    if not facts.has_patches:
        return f"scorer={source} gives no patch features: name one with a ViT and linear projection"
    if not facts.has_words:
        return f"scorer={source} reads another vocabulary than CLIP's, which the captions are in: name another"
    if facts.image_size != image_size:
        return (
            f"scorer={source} takes pictures of {facts.image_size} pixels, and the views have {image_size}: set "
            f"image_size={facts.image_size}, or name another scorer"
        )
    for name, ours, theirs in (("mean", mean, facts.mean), ("std", std, facts.std)):
        if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-3):
            return f"scorer={source} was trained with data.{name}={list(theirs)}: set that, or name another scorer"
    return None


def fit_length(tokens: Tensor, length: int) -> Tensor:
    """Lengthen token ids with zeros or cut them, so that a cut text still ends with its end token, the highest id."""
    if tokens.shape[1] <= length:
        return F.pad(tokens, (0, length - tokens.shape[1]))
    cut = tokens[:, :length].clone()
    cut[:, -1] = torch.where(tokens[:, length:].any(1), tokens.amax(1), cut[:, -1])
    return cut


Scorer = tuple[Any, Callable[[Tensor], Tensor], int]  # model with encode_text, images -> (B, D, h, w), text length


def _of_open_clip(name_and_tag: str) -> Scorer:
    model: Any = open_clip_model(name_and_tag, "scorer")
    visual = model.visual
    if hasattr(visual, "trunk"):
        return model, lambda images: _project(visual.head, feature_map(visual.trunk, images)), model.context_length

    def features(images: Tensor) -> Tensor:
        found = visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
        )
        return torch.einsum("bchw,cd->bdhw", found["image_intermediates"][-1], visual.proj)

    return model, features, model.context_length


def _of_run(folder: str) -> Scorer:
    from hydra.utils import instantiate

    cfg = _run_config(folder)
    model: Any = instantiate(cfg.objective)
    load_weights(model, folder)
    project = model.image_projection
    return model, lambda images: _project(project, feature_map(model.backbone, images)), model.text.context_length


def _project(projection: nn.Module, features: Tensor) -> Tensor:
    """Apply a projection of pooled features to each patch: (B, C, h, w) -> (B, D, h, w)."""
    return projection(features.movedim(1, -1)).movedim(-1, 1)


def _run_config(folder: str) -> Any:
    if not is_run(folder):
        raise ValueError(f"scorer={folder} is neither open_clip:NAME/TAG nor a run folder: it has no {CONFIG}")
    cfg: Any = load_run(folder)
    if "text" not in cfg.objective or cfg.objective.text is None:
        raise ValueError(f"scorer={folder} encodes images only: name a run of an image-text objective")
    if "scorer" in cfg.objective:
        cfg.objective.scorer = None  # it was needed for training alone
    return cfg


def _run_facts(folder: str) -> ScorerFacts:
    cfg = _run_config(folder)
    words = (cfg.get("tokenizer") or {}).get("_target_") == "open_clip.SimpleTokenizer"
    mean, std = tuple(cfg.data.mean), tuple(cfg.data.std)
    return ScorerFacts(cfg.image_size, mean, std, has_patches=True, has_words=words)
