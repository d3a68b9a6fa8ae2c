"""A picture of what masking does: images, what is left of them, reconstructions, similarity to the caption."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repr.drawing import PAPER, SIDE, Show, enlarge, grid
from repr.losses.reconstruction import patchify, unpatchify
from repr.models.decoder import Decoder
from repr.objectives.masked import Masked

LINE, NUM_LINES, LETTERS = 18, 3, 24  # height of a line of text in pixels; lines of a caption, letters of a line
BLANK = 128  # the gray of a removed patch


def draw(masked: Masked, decoder: Decoder | None, text: Tensor | None, show: Show) -> Tensor:
    """Draw a column for each sample: (3, H, W) uint8 on the CPU.

    From top to bottom it shows the image and what is visible of it; with a decoder, the visible patches with the
    predicted ones; for text-guided masking, the similarity to the caption (dark to bright from the least to the most
    similar patch) and, if ``text`` (B, L) has CLIP's token ids, the caption. ``show`` undoes the normalisation.
    """
    images, mask, size = masked.images.float(), masked.mask, masked.patch_size
    pixels, patches, removed = show(images), patchify(images, patch_size=size), mask.removed[..., None]
    holes = unpatchify(removed.expand(-1, -1, size**2), patch_size=size).cpu() > 0
    rows = {"image": pixels, "visible": torch.where(holes, BLANK, pixels.int()).byte()}
    if decoder is not None:
        pred = decoder.pixels(decoder(masked.tokens, mask.ids_restore).float(), patches)
        rows["reconstruction"] = show(unpatchify(torch.where(removed > 0, pred, patches), patch_size=size))
    if masked.similarity is not None:
        rows["similarity"] = _heat(masked.similarity.float().cpu())
    cells = [[write(name), *map(enlarge, pictures)] for name, pictures in rows.items()]
    if masked.similarity is not None and text is not None:
        cells.append([write("caption"), *(write(_caption(row)) for row in text.tolist())])
    return grid(cells)


def _heat(values: Tensor) -> Tensor:
    """(B, L) -> (B, 3, h, w) uint8, of each row from the least to the most: black, red, yellow, white."""
    least, most = values.aminmax(dim=1, keepdim=True)
    side = round(values.shape[1] ** 0.5)
    x = ((values - least) / (most - least).clamp(min=1e-6)).unflatten(1, (side, side))
    return (torch.stack([3 * x, 3 * x - 1, 3 * x - 2], dim=1).clamp(0, 1) * 255).byte()


def _caption(ids: list[int]) -> str:
    """The words of a row of token ids."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    special = {0, tokenizer.sot_token_id, tokenizer.eot_token_id}
    return tokenizer.decode([token for token in ids if token not in special]).strip()


def write(text: str) -> Tensor:
    """Words on paper as wide as a picture: (3, H, W) uint8. What does not fit is cut."""
    canvas = Image.new("L", (SIDE, LINE * NUM_LINES), PAPER)
    lines = textwrap.wrap(text, LETTERS)[:NUM_LINES]
    ImageDraw.Draw(canvas).text((0, 0), "\n".join(lines), "black", ImageFont.load_default(14))
    return torch.from_numpy(np.asarray(canvas).copy()).expand(3, -1, -1)
