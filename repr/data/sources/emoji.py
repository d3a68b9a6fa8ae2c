"""The embedded emoji."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from repr.data.sources.columns import Labels
from repr.data.sources.pictures import decode, open_zip

WHITE = 230  # from this value on in all channels, a pixel of an emoji is ground; WebP blurs white down to some 235

EMOJI_ZIP = Path(__file__).with_name("emoji64.zip")
EMOJI_ATTRIBUTES = ("category", "subcategory", "style", "concept")
EMOJI_TEXTS = ("caption", "keywords")


@lru_cache(maxsize=1)
def _emoji_index() -> list[dict[str, Any]]:
    """The rows of the embedded index, all splits."""
    return [json.loads(line) for line in open_zip(EMOJI_ZIP, os.getpid()).read("index.jsonl").splitlines()]


class Emoji:
    """The embedded data set: emoji of six vendors, 64 x 64 (sources and licences: NOTICE.txt inside the zip).

    Args:
        split: ``train``, ``val`` (concepts never trained on), ``test_style`` (trained concepts drawn by
            a vendor never trained on) or ``test_both``.
        captions: which texts a row offers, in this order: ``caption``, ``keywords`` (joined by a comma).

    Raises:
        ValueError: unknown split or text.
    """

    mask_classes: ClassVar = {"figure": ["ground", "figure"]}

    def __init__(self, split: str, *, captions: Sequence[str] = ("caption",)) -> None:
        rows = _emoji_index()
        splits = sorted({row["split"] for row in rows})
        if split not in splits:
            raise ValueError(f"Emoji: no split {split!r}; set split to one of {splits}")
        if isinstance(captions, str) or not set(captions) <= set(EMOJI_TEXTS):
            raise ValueError(f"Emoji: captions={captions!r}; set a list out of {list(EMOJI_TEXTS)}")
        self._rows, self._texts = [row for row in rows if row["split"] == split], captions
        self.attributes = {name: Labels.of(row[name] for row in self._rows) for name in EMOJI_ATTRIBUTES}

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The row's key in the embedded index."""
        return self._rows[index]["key"]

    def encoded(self, index: int) -> bytes:
        """The picture as WebP."""
        return open_zip(EMOJI_ZIP, os.getpid()).read(self._rows[index]["file"])

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        return decode(self.encoded(index), f"{EMOJI_ZIP}:{self._rows[index]['file']}", ["WEBP"])

    def masks(self, index: int) -> np.ndarray:
        """Which pixels are not white: (1, 64, 64) uint8. White inside a drawing counts as ground."""
        return (np.asarray(self.image(index)).min(2) < WHITE).astype(np.uint8)[None]

    def captions(self, index: int) -> list[str]:
        """The texts chosen by ``captions``, without empty ones."""
        row = self._rows[index]
        texts = {"caption": row["caption"], "keywords": ", ".join(row["keywords"])}
        return [texts[name] for name in self._texts if texts[name]]
