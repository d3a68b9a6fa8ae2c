"""A frozen image-text model that tells how near each patch of a picture is to its caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.models.backbone import feature_map
from repr.models.masking import project_map
from repr.runs.folder import CONFIG, is_run, load_run
from repr.runs.initial_weights import load_weights, open_clip_model

OTHER_WORDS = "scorer={} reads another vocabulary than CLIP's, which the captions are in: name another"
Towers = tuple[Any, Callable[[Tensor], Tensor], int]  # model with encode_text, images -> (B, D, h, w), text length


class ScorerFacts(NamedTuple):
    """What a scorer was made for, known without its weights."""

    image_size: int  # side of its pictures in pixels
    mean: tuple[float, ...]  # of the channels, subtracted from pixels in [0, 1]
    std: tuple[float, ...]


class PatchScorer:
    """Patches and captions in the space of a trained image-text model.

    It is no ``nn.Module``: its weights are not trained, and in no checkpoint of the run. They are read with the first
    batch, so that a run can be checked, evaluated and exported without them. Of a CLIP ViT the patch features are the
    tokens after the last norm, through the projection that CLIP applies to the class token.

    Args:
        source: ``open_clip:NAME/TAG`` (TAG is a tag of open_clip or the path of a local file), or the folder of a run
            with an image-text objective.

    Raises:
        ValueError: the source cannot be one, see :func:`scorer_facts`.
    """

    def __init__(self, source: str) -> None:
        self.source, self.facts = source, scorer_facts(source)

    @classmethod
    def load(cls, source: str | None) -> PatchScorer | None:
        """The scorer of a source, or None of None: what the option ``scorer`` of a config means."""
        return None if source is None else cls(source)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Views of another size or normalisation than the scorer's."""
        facts, size = self.facts, next((view.size for view in (cfg.get("views") or {}).values()), cfg.image_size)
        if facts.image_size != size:
            yield (
                f"scorer={self.source} takes pictures of {facts.image_size} pixels, and the views have {size}: set "
                f"image_size={facts.image_size}, or name another scorer"
            )
        for name, ours, theirs in (("mean", cfg.data.mean, facts.mean), ("std", cfg.data.std, facts.std)):
            if any(abs(a - b) > 1e-3 for a, b in zip(ours, theirs, strict=True)):
                told = f"scorer={self.source} was trained with data.{name}={list(theirs)}"
                yield f"{told}: set that, or name another scorer"

    @cached_property
    def _towers(self) -> Towers:
        with torch.random.fork_rng(devices=[]):
            kind, _, rest = self.source.partition(":")
            towers = _of_open_clip(rest) if kind == "open_clip" else _of_run(self.source)
        towers[0].eval().requires_grad_(False)
        return towers

    @torch.no_grad()
    def __call__(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            images: (B, 3, S, S), normalised as the scorer was trained.
            tokens: (B, L) int64 of CLIP's vocabulary, of any length.

        Returns:
            Features of patches (B, D, h, w), and of captions (B, D).
        """
        model, features, length = self._towers
        model.to(images.device)
        text = model.encode_text(fit_length(tokens, length))
        return features(images), text


def scorer_facts(source: str) -> ScorerFacts:
    """Read what a scorer was made for, without loading its weights.

    Args:
        source: as for :class:`PatchScorer`.

    Raises:
        ValueError: there is no such source, it is no image-text model, its picture features are no mean or token of
            patches that share their space, or it reads another vocabulary than CLIP's.
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
    resnet = not isinstance(vision.get("layers", 12), int)  # CLIP's own, which pool by attention
    if resnet or vision.get("timm_pool", "avg") not in ("avg", "token", "") or vision.get("attentional_pool"):
        raise ValueError(f"scorer={source} gives no patch features: name one with a ViT and linear projection")
    if "hf_tokenizer_name" in text or text.get("vocab_size", 49408) != 49408:
        raise ValueError(OTHER_WORDS.format(source))
    return ScorerFacts(
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(given.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(given.get("std") or open_clip.OPENAI_DATASET_STD),
    )


def fit_length(tokens: Tensor, length: int) -> Tensor:
    """Lengthen token ids with zeros or cut them, so that a cut text still ends with its end token, the highest id."""
    if tokens.shape[1] <= length:
        return F.pad(tokens, (0, length - tokens.shape[1]))
    cut = tokens[:, :length].clone()
    cut[:, -1] = torch.where(tokens[:, length:].any(1), tokens.amax(1), cut[:, -1])
    return cut


def _of_open_clip(name_and_tag: str) -> Towers:
    model: Any = open_clip_model(name_and_tag, "scorer")
    visual = model.visual
    if hasattr(visual, "trunk"):
        return model, lambda images: project_map(visual.head, feature_map(visual.trunk, images)), model.context_length

    def features(images: Tensor) -> Tensor:
        options = {"normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NCHW"}
        (patches,) = visual.forward_intermediates(images, indices=1, **options)["image_intermediates"]
        return torch.einsum("bchw,cd->bdhw", patches, visual.proj)

    return model, features, model.context_length


def _of_run(folder: str) -> Towers:
    from hydra.utils import instantiate

    cfg = _run_config(folder)
    model: Any = instantiate(cfg.objective)
    load_weights(model, folder)
    project = model.image_projection
    if not isinstance(project, torch.nn.Linear):
        raise ValueError(f"scorer={folder} has an MLP on its towers (hidden_dim), and cells need a linear projection")
    return model, lambda images: project_map(project, feature_map(model.backbone, images)), model.text.context_length


def _run_config(folder: str) -> Any:
    if not is_run(folder):
        raise ValueError(f"scorer={folder} is neither open_clip:NAME/TAG nor a run folder: it has no {CONFIG}")
    cfg: Any = load_run(folder, built=("objective", "tokenizer"))
    if "text" not in cfg.objective or cfg.objective.text is None:
        raise ValueError(f"scorer={folder} encodes images only: name a run of an image-text objective")
    cfg.scorer = None  # its own was needed for training alone
    return cfg


def _run_facts(folder: str) -> ScorerFacts:
    cfg = _run_config(folder)
    if (cfg.get("tokenizer") or {}).get("_target_") != "open_clip.SimpleTokenizer":
        raise ValueError(OTHER_WORDS.format(folder))
    return ScorerFacts(cfg.image_size, tuple(cfg.data.mean), tuple(cfg.data.std))
