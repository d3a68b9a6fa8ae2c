"""A picture of what masking does: images, what is left of them, reconstructions, similarity to the caption."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repr.drawing import PAPER, SIDE, Show, enlarge, grid
from repr.losses.reconstruction import patchify, unpatchify

LINE, NUM_LINES = 18, 3  # height of a line of text in pixels; lines of a caption
BLANK = 128  # the gray of a removed patch


def draw(
    images: Tensor,
    removed: Tensor,
    show: Show,
    *,
    patch_size: int,
    pred: Tensor | None = None,
    similarity: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Draw a column a sample.

    From top to bottom: image, image without the removed patches, kept patches with the predicted ones, map of
    similarity (dark to bright from the least to the most similar patch), caption.

    Args:
        images: (B, 3, S, S) float, normalised.
        removed: (B, L), 1 = removed.
        show: undoes the normalisation.
        patch_size: p.
        pred: (B, L, p * p * 3), the patches as predicted; None leaves the row out.
        similarity: (B, L); None leaves the row out.
        tokens: (B, T), CLIP's token ids of the captions; None leaves the row out.

    Returns:
        (3, H, W) uint8 on the CPU.
    """
    pixels = show(images)
    holes = unpatchify(removed[..., None].expand(-1, -1, patch_size**2), patch_size=patch_size).cpu() > 0
    rows = {"image": pixels, "visible": torch.where(holes, BLANK, pixels.int()).byte()}
    if pred is not None:
        both = torch.where(removed[..., None] > 0, pred, patchify(images, patch_size=patch_size))
        rows["reconstruction"] = show(unpatchify(both, patch_size=patch_size))
    if similarity is not None:
        rows["similarity"] = _heat(similarity.float().cpu())
    cells = [[_write(name), *map(enlarge, pictures)] for name, pictures in rows.items()]
    if tokens is not None:
        cells.append([_write("caption"), *(_write(_caption(row)) for row in tokens.tolist())])
    return grid(cells)


def _heat(values: Tensor) -> Tensor:
    """(B, L) -> (B, 3, h, w) uint8, of each row from the least to the most: black, red, yellow, white."""
    least, most = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    side = round(values.shape[1] ** 0.5)
    x = ((values - least) / (most - least).clamp(min=1e-6)).unflatten(1, (side, side))
    return (torch.stack([3 * x, 3 * x - 1, 3 * x - 2], dim=1).clamp(0, 1) * 255).byte()


def _caption(ids: list[int]) -> str:
    """The words of a row of token ids."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    special = {0, tokenizer.sot_token_id, tokenizer.eot_token_id}
    return tokenizer.decode([token for token in ids if token not in special]).strip()


def _write(text: str) -> Tensor:
    """Words on paper as wide as a picture: (3, H, W) uint8. What does not fit is cut."""
    font, lines = ImageFont.load_default(14), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    canvas = Image.new("L", (SIDE, LINE * NUM_LINES), PAPER)
    ImageDraw.Draw(canvas).text((0, 0), "\n".join(lines[:NUM_LINES]), "black", font)
    return torch.from_numpy(np.asarray(canvas).copy()).expand(3, -1, -1)
