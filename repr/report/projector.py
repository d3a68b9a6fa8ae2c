"""The maps of the report as embeddings in TensorBoard's projector."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image

from repr.metrics.exhibits import Exhibits
from repr.report.exhibits import COLUMNS, POINT
from repr.training.tensorboard import writers

SIDE = 24  # of a picture in the projector, in pixels
FOLDER = (
    "00000"  # where SummaryWriter puts the embeddings of step 0, so that there are only those of the last evaluation
)


def add_projector(trainer: pl.Trainer, exhibits: Mapping[str, Exhibits]) -> None:
    """Write the points of every map with their pictures, captions and class names, in place of earlier ones.

    Call it on the first process. A point has the up to 32 principal coordinates that the report's map is made of.
    """
    for writer in writers(trainer):
        shutil.rmtree(Path(writer.log_dir, FOLDER), ignore_errors=True)
        for name, arrays in exhibits.items():
            if "rows" in arrays:
                columns = _columns(arrays)
                writer.add_embedding(
                    arrays["map/pca"].astype(float).round(4),  # as text, digits are what takes room
                    metadata=_lines(columns, len(arrays["rows"])),
                    metadata_header=list(columns) if len(columns) > 1 else None,  # one column must not have any
                    label_img=_pictures(arrays) if "sheet/map" in arrays else None,
                    global_step=int(FOLDER),
                    tag=name,
                )
        writer.close()  # Lightning has closed it before, at the end of training


def _columns(arrays: Exhibits) -> dict[str, list[str]]:
    columns = {"caption": arrays["captions"].tolist()} if "captions" in arrays else {}
    for name in (key.removeprefix("labels/") for key in arrays if key.startswith("labels/")):
        names = arrays[f"names/{name}"].tolist()
        columns[name] = [names[label] if label >= 0 else "" for label in arrays[f"labels/{name}"].tolist()]
    return {_cell(name): [_cell(value) for value in values] for name, values in columns.items()}


def _lines(columns: Mapping[str, list[str]], num: int) -> Any:
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [list(line) for line in zip(*columns.values(), strict=True)] or [str(row) for row in range(num)]


def _cell(text: str) -> str:
    """A text without what ends a cell of a table or is no text at all."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def _pictures(arrays: Exhibits) -> torch.Tensor:
    """The small pictures of the map, (M, 3, SIDE, SIDE) in [0, 1]."""
    sheet = Image.open(io.BytesIO(arrays["sheet/map"].tobytes())).convert("RGB")
    num_lines = sheet.height // POINT
    pixels = np.asarray(sheet.resize((COLUMNS * SIDE, num_lines * SIDE)), dtype=np.float32)
    tiles = pixels.reshape(num_lines, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    return torch.from_numpy(tiles[: len(arrays["rows"])] / 255)
