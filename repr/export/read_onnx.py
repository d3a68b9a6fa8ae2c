"""The towers beside this file: ``model, preprocess, tokenizer = load()``. Needs numpy, pillow, onnxruntime.

Of texts it needs open_clip, too, for the tokenizer alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


class Towers:
    """The embeddings of images and texts, not normalised."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.sessions = {path.stem: onnxruntime.InferenceSession(path, **options) for path in folder.glob("*.onnx")}

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) float32 -> (B, D)."""
        return self.sessions["image"].run(None, {"pixels": pixels})[0]

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        """(B, L) int64 -> (B, D)."""
        return self.sessions["text"].run(None, {"tokens": tokens})[0]


class Preprocess:
    """A picture -> (3, size, size) float32."""

    def __init__(self, size: int, mean: list[float], std: list[float], **_: Any) -> None:
        self.size, self.mean, self.std = size, np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize the shorter side, take the central square, normalise."""
        image, short = image.convert("RGB"), min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        square = np.asarray(image.crop((left, top, left + self.size, top + self.size)), np.float32) / 255
        return ((square - self.mean) / self.std).transpose(2, 0, 1)


def load(folder: str | Path = Path(__file__).parent, **options: Any) -> tuple[Towers, Preprocess, Any]:
    """Model, transform of a PIL picture, tokenizer (None where no text was trained); options go to onnxruntime."""
    settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    tokenizer = None
    if "text" in settings:
        from open_clip import SimpleTokenizer

        words = {key: value for key, value in settings["text"].items() if key != "tokenizer"}
        simple = SimpleTokenizer(**words)

        def tokenizer(texts: list[str]) -> np.ndarray:
            return simple(texts).numpy()

    return Towers(Path(folder), **options), Preprocess(**settings["image"]), tokenizer
