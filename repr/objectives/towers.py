"""What flows with a tower for pictures and one for texts share: captions, projection, temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from repr.batch import Batch
from repr.distributed import mean
from repr.models.backbone import width_of
from repr.objectives.base import Objective


def captions(batch: Batch) -> Tensor:
    """The captions of a batch, (B, L) token ids; where it has none, a ValueError says what to set."""
    if "text" not in batch:
        raise ValueError("captions are needed here: set a tokenizer, and give data that has them")
    return batch["text"]


def further_captions(batch: Batch) -> list[Tensor]:
    """The further captions of a batch, (B, L) token ids each; where it has none, a ValueError says what to set."""
    if "texts" not in batch:
        raise ValueError("every_pair: the batch has no further captions; set distorted_captions=shuffled")
    return list(batch["texts"].unbind(1))


def further_faults(cfg: Any) -> Iterator[str]:
    """Missing further captions."""
    if not (cfg.data.get("distorted_captions") or cfg.data.get("num_texts")):
        yield "every_pair compares views with further captions: set distorted_captions=shuffled, or data.num_texts"


def pooled_text(text: nn.Module, tokens: Tensor) -> Tensor:
    """(B, L) -> (B, D), of a tower that may give its words besides."""
    output = text(tokens)
    return output[0] if isinstance(output, tuple) else output


def text_faults(flow: str, text: nn.Module, cfg: Any, *, num_more: int = 0) -> Iterator[str]:
    """Missing captions, and a text tower that does not read what the tokenizer of a config gives.

    ``num_more`` words of the tower are none of the tokenizer's, such as one that hides others.
    """
    node = cfg.data.get("tokenizer")
    if not OmegaConf.is_dict(node):
        told = "null" if node is None else node
        yield f"{flow} reads captions, and tokenizer is {told}: set it, or another objective"
        return
    given, read = node.get("context_length"), getattr(text, "context_length", None)
    shorter = not isinstance(text, TextTransformer)  # which reads texts of one length; others take shorter ones
    if None not in (given, read) and given != read and not (shorter and given < read):
        yield f"tokenizer.context_length={given} is not text.context_length={read}: set both to one number"
    num = num_words(OmegaConf.to_yaml(node, resolve=True))
    known = max((part.num_embeddings for part in text.modules() if isinstance(part, nn.Embedding)), default=None)
    if num is not None and known is not None and num + num_more > known:
        of_them = f", and {num_more} more are needed" if num_more else ""
        yield f"tokenizer has {num} words{of_them}, and text.vocab_size is {known}: set it to {num + num_more}"


@cache
def num_words(tokenizer: str) -> int | None:
    """How many words the tokenizer of a config, as YAML, has; None where it does not tell."""
    made = instantiate(OmegaConf.create(tokenizer))
    inner = getattr(made, "tokenizer", ())  # of those of Hugging Face
    return getattr(made, "vocab_size", None) or len(inner) or None


def takes_extra(loss: Callable) -> bool:
    """Whether a loss takes further texts beside the captions."""
    return "extra_text" in signature(loss).parameters


class TwoTowers(Objective):
    """A base of flows that bring pictures and texts into one space, of D dimensions, under a learned temperature."""

    ENCODERS: tuple[str, ...] = ("backbone", "text")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "temperature": "By which the cosines of the contrast are divided.",
        "hard_captions": "Wrong captions of a sample, on average; less than were asked for where none could be made.",
    }
    text: Any
    image_projection: nn.Module
    logit_scale: nn.Parameter
    temperature_range: tuple[float, float]

    def add_text_tower(
        self,
        text: nn.Module,
        temperature: float,
        temperature_range: tuple[float, float],
        *,
        learned: bool,
        width: int | None = None,
    ) -> None:
        """Set ``text``, ``image_projection`` to its width (no bias, CLIP's initial weights), and ``logit_scale``.

        The projection is of what the backbone gives, unless another ``width`` is told.

        The scale is the logarithm of 1 / temperature, as open_clip has it, and a parameter even where it is not
        ``learned``, so that checkpoints and exports hold it under open_clip's name.

        Raises:
            ValueError: the temperature lies outside of its range.
        """
        low, high = temperature_range
        if not 0 < low <= temperature <= high:
            raise ValueError(f"temperature={temperature} lies outside temperature_range=({low}, {high})")
        width = width_of(self.backbone) if width is None else width
        self.text = text
        self.image_projection = nn.Linear(width, width_of(text, "output_dim"), bias=False)
        nn.init.normal_(self.image_projection.weight, std=width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), learned)
        self.temperature_range = temperature_range

    def encode_image(self, images: Tensor) -> Tensor:
        """Whole pictures, nothing masked: (B, 3, H, W) -> (B, D), not normalised."""
        return self.image_projection(self.backbone(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return pooled_text(self.text, tokens)

    def encode_captions(self, batch: Batch, logs: dict[str, Tensor | float]) -> tuple[Tensor, dict[str, Any]]:
        """The captions of a batch, (B, D) in float32, and the arguments of the contrast that are its wrong captions.

        All go through the text tower together. How many wrong ones a sample has comes in ``logs``.
        """
        tokens = captions(batch)
        if "hard_text" not in batch or not self.takes_hard_captions:
            return self.encode_text(tokens).float(), {}
        hard = batch["hard_text"].flatten(0, 1)  # (B * K, L)
        valid = hard.any(1)
        logs["hard_captions"] = mean(valid.sum() / len(tokens))
        hard = hard.where(valid[:, None], tokens.repeat_interleave(batch["hard_text"].shape[1], 0))  # no text is empty
        text, extra = self.encode_text(torch.cat([tokens, hard])).float().tensor_split([len(tokens)])
        return text, {"extra_text": extra, "extra_valid": valid}

    def num_extra(self, num_rows: int) -> float | Tensor:
        """How many wrong captions the last step had with ``num_rows`` samples."""
        return num_rows * self.output.logs.get("hard_captions", 0.0)

    @torch.no_grad()
    def update_targets(self) -> None:
        """Clamp the temperature."""
        low, high = self.temperature_range
        self.logit_scale.clamp_(-math.log(high), -math.log(low))
