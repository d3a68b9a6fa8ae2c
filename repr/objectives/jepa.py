"""What an encoder makes of some patches predicts what its teacher makes of others: I-JEPA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from repr.batch import Batch, Embeddings, StepOutput
from repr.distributed import mean
from repr.losses.reconstruction import feature_prediction
from repr.models.backbone import every_token, width_of
from repr.models.decoder import Decoder
from repr.models.masking import encode_kept, take
from repr.models.target_blocks import TargetBlocks, too_few
from repr.models.teacher import Teacher
from repr.models.unreached import freeze_unreached
from repr.objectives.base import Objective
from repr.objectives.masked import MakeDecoder, Positions, embed_unmasked, masking_faults, prepare_vit
from repr.objectives.views import warn_of_class_token
from repr.optim import Optim

TARGET_BLOCKS = TargetBlocks()


class JEPA(Objective):
    """A ViT sees some patches of a picture, and a decoder says what its teacher makes of blocks of others.

    Method: I-JEPA (Assran et al., 2023, arXiv 2301.08243).

    Flow: patches of the first view -> context -> backbone on its patches alone -> decoder, one block at a time unless
    ``together``, from the context and a mask token with its position for each patch of the block: features; the whole
    view -> teacher's backbone -> patches of the blocks, normalised. There is no BatchNorm, and nothing is gathered.
    Reduced: the loss.

    Terms: ``features``.

    Args:
        backbone: a timm ``VisionTransformer`` without classifier. What it pools is evaluated, which is to be the mean
            of patches (``global_pool=avg fc_norm=false``): nothing tells a class token what to be, and I-JEPA has none.
        blocks: which patches are predicted.
        decoder: the paper's predictor, called as :class:`repr.models.decoder.Decoder`, such as a ``functools.partial``
            of it.
        together: whether one pass of the decoder predicts all blocks, whose mask tokens then see each other, where the
            paper's predicts each from the context alone; a step takes about .7 of the time.
        positions: ``sincos`` replaces the backbone's positions by fixed ones, ``learned`` leaves them.
        momentum: of the teacher at the start; it rises to 1 over the run along a straight line.
    """

    TERMS = ("features",)
    ENCODERS = ("backbone", "decoder")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "features": "Smooth distance from what the teacher makes of the patches of blocks; lower is better.",
    }
    teacher: Teacher

    def __init__(
        self,
        backbone: nn.Module,
        *,
        blocks: TargetBlocks = TARGET_BLOCKS,
        decoder: MakeDecoder = Decoder,
        together: bool = False,
        positions: Positions = "sincos",
        momentum: float = 0.996,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights=weights, optim=optim)
        prepare_vit(backbone, positions)
        self.blocks, self.together, self.positions = blocks, together, positions
        width, grid = width_of(backbone), cast(Any, backbone).patch_embed.grid_size
        if grid[0] * grid[1] <= blocks.num:
            raise ValueError(too_few(blocks.num, grid))
        freeze_unreached(backbone, type(self).__name__, every_token)
        self.decoder = decoder(width, grid, width, num_prefix_tokens=0)
        self.teacher = Teacher(momentum=momentum, final_momentum=1, schedule="linear", backbone=self.backbone)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """What every masked flow finds; warns of class tokens."""
        warn_of_class_token(self, cfg)
        yield from masking_faults(self, cfg)
        yield from super().config_faults(cfg)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of whole pictures, see :func:`repr.objectives.masked.embed_unmasked`."""
        return embed_unmasked(self.backbone, batch["image"])

    def step(self, batch: Batch) -> StepOutput:
        """The term of the global batch; its gradient is that of this rank's rows, which DDP averages."""
        vit = cast(Any, self.backbone)
        images, prefix = batch["views"][0], vit.num_prefix_tokens
        if "seed" not in batch:
            raise ValueError('blocks are drawn from batch["seed"]: give (B,) int64, other numbers in every epoch')
        if images.shape[2:] != vit.patch_embed.img_size:
            raise ValueError(f"views of {vit.patch_embed.img_size} pixels are masked; got {tuple(images.shape[2:])}")
        ids_keep, blocks = self.blocks.draw(batch["seed"], vit.patch_embed.grid_size, step=self.step_number)
        passes = 1 if self.together else blocks.shape[1]
        # (M * B, T), the first block of all pictures first; or (B, M * T)
        ids = blocks.flatten(1) if self.together else blocks.transpose(0, 1).flatten(0, 1)
        context = encode_kept(vit, images, ids_keep)
        seen = context[:, prefix:].repeat(passes, 1, 1)
        pred = self.decoder.forward_from(seen, ids_keep.repeat(passes, 1), ids)  # of the shape of ids, and D
        with torch.no_grad():
            whole = self.teacher.backbone.forward_features(images)[:, prefix:]
            target = take(whole.repeat(passes, 1, 1), ids)
        pooled = vit.forward_head(context).detach()
        return StepOutput({"features": mean(feature_prediction(pred, target))}, {"context": pooled})
