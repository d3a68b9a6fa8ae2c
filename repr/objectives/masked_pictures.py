"""A picture of what masking does: images, what is left of them, reconstructions, similarity to the caption."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.losses.reconstruction import patchify, unpatchify

CELL, SEAM, LINE = 192, 4, 20  # side of a picture, gap between two, height of a line of text, in pixels
LINES = 2  # of a caption
BLANK = 0.5  # the gray of a removed patch


def draw(
    images: Tensor,
    removed: Tensor,
    *,
    patch_size: int,
    pred: Tensor | None = None,
    similarity: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Draw a column a sample.

    From top to bottom: image, image without the removed patches, kept patches with the predicted ones, map of
    similarity (dark to bright from the least to the most similar patch), caption.

    Pixels are shown between the lowest and the highest of each channel in all images, since normalisation is not known
    here.

    Args:
        images: (B, 3, S, S) float.
        removed: (B, L), 1 = removed.
        patch_size: p.
        pred: (B, L, p * p * 3), the patches as predicted; None leaves the row out.
        similarity: (B, L); None leaves the row out.
        tokens: (B, T), CLIP's token ids of the captions; None leaves the row out.

    Returns:
        (3, H, W) uint8 on the CPU.
    """
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)

    def shown(x: Tensor) -> Tensor:
        return ((x - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)

    holes = unpatchify(removed[..., None].expand(-1, -1, patch_size**2), patch_size=patch_size)  # (B, 1, S, S)
    rows = [
        ("image", shown(images)),
        ("visible", torch.where(holes > 0, torch.full_like(images, BLANK), shown(images))),
    ]
    if pred is not None:
        kept = patchify(images, patch_size=patch_size)
        both = torch.where(removed[..., None] > 0, pred, kept)
        rows.append(("reconstruction", shown(unpatchify(both, patch_size=patch_size))))
    if similarity is not None:
        least, most = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
        side = round(similarity.shape[1] ** 0.5)
        rows.append(("similarity", _heat(((similarity - least) / (most - least).clamp(min=1e-6)).view(-1, side, side))))
    captions = [] if tokens is None else [_caption(row) for row in tokens.tolist()]
    return _paint(rows, captions)


def _heat(x: Tensor) -> Tensor:
    """(B, h, w) in [0, 1] -> (B, 3, h, w) from black over red to yellow and white."""
    return torch.stack([3 * x, 3 * x - 1, 3 * x - 2], dim=1).clamp(0, 1)


def _caption(ids: list[int]) -> str:
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    special = {0, tokenizer.sot_token_id, tokenizer.eot_token_id}
    return tokenizer.decode([token for token in ids if token not in special]).strip()


def _paint(rows: list[tuple[str, Tensor]], captions: list[str]) -> Tensor:
    num, step = len(rows[0][1]), CELL + SEAM
    width, margin = num * step + SEAM, LINE + SEAM
    height = len(rows) * (CELL + margin) + (LINE * LINES + SEAM if captions else 0) + SEAM
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    y = 0
    for name, pictures in rows:
        pen.text((SEAM, y + 2), name, "black", font)
        cells = F.interpolate(pictures, (CELL, CELL), mode="nearest").mul(255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for column, cell in enumerate(cells):
            canvas.paste(Image.fromarray(cell), (SEAM + column * step, y + margin))
        y += margin + CELL
    for column, caption in enumerate(captions):
        for line, text in enumerate(_lines(caption, font)):
            pen.text((SEAM + column * step, y + SEAM + line * LINE), text, "black", font)
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Words on at most ``LINES`` lines of a cell's width; what is left over is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= CELL:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:LINES]
