"""The stages of a multistage run as one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor

from repr.batch import Batch, Embeddings
from repr.models.backbone import width_of
from repr.models.concat import Concat, Encoder, Norm, join
from repr.runs.folder import STAGE, stage_folder
from repr.runs.trained import Trained


class Joined(pl.LightningModule):
    """The stages side by side, to be evaluated like any objective; it is not trained.

    Args:
        stages: objectives.
        norm: see :func:`repr.models.concat.join`.

    Attributes:
        image: encoder (B, 3, H, W) -> (B, sum of D) of unit length, called like a backbone.
        text: likewise of token ids (B, L); None without text towers.
    """

    def __init__(self, stages: Sequence[Any], *, norm: Norm = "joined") -> None:
        super().__init__()
        self.norm = norm
        texts = [getattr(stage, "text", None) for stage in stages]
        has_text = all(text is not None for text in texts)
        widths = [
            width_of(stage.backbone) if text is None else text.output_dim
            for stage, text in zip(stages, texts, strict=True)
        ]
        pairs = list(zip(stages, widths, strict=True))
        self.image = Concat([Encoder(stage, "encode_image", width) for stage, width in pairs], norm=norm)
        self.text = Concat([Encoder(stage, "encode_text", w) for stage, w in pairs], norm=norm) if has_text else None

    def configure_model(self) -> None:
        """Every process holds all of it, under FSDP2 too, which asks for this hook: nothing is trained."""

    def embed(self, batch: Batch) -> Embeddings:
        """The embeddings of the stages for an evaluation batch, joined field by field; logits are not joined."""
        parts: list[Embeddings] = [cast(Any, encoder).module.embed(batch) for encoder in self.image.encoders]
        texts = [part.text for part in parts if part.text is not None]
        return Embeddings(
            image=join([part.image for part in parts], self.norm),
            trunk=join([part.trunk for part in parts], self.norm),
            text=join(texts, self.norm) if texts else None,
            poolings={name: join([p.poolings[name] for p in parts], self.norm) for name in parts[0].poolings},
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, sum of D)."""
        return self.image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, sum of D).

        Raises:
            ValueError: the stages have no text towers.
        """
        if self.text is None:
            raise ValueError("these stages encode images only")
        return self.text(tokens)

    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Embeddings:
        """Embed an evaluation batch."""
        return self.embed(batch)


def load_joined(
    run_folder: str | Path, *, num_stages: int | None = None, norm: Norm = "joined", trust: bool = False
) -> Joined:
    """The joined encoder of a multistage run, in evaluation mode, on the CPU.

    Args:
        run_folder: of the whole run.
        num_stages: how many stages, from the first; None: all that are finished.
        norm: see :func:`repr.models.concat.join`.
        trust: see :func:`repr.runs.folder.load_run`.

    Raises:
        ValueError: there is no such stage.
    """
    num_stages = len(list(Path(run_folder).glob(f"stage-*/{STAGE}"))) if num_stages is None else num_stages
    if not num_stages:
        raise ValueError(f"{run_folder} has no finished stage: give the folder of a multistage run")
    stages = [Trained.read(stage_folder(run_folder, stage), trust=trust).objective for stage in range(num_stages)]
    return Joined(stages, norm=norm).eval()
