"""Feature tables on disk: written row by row while Lightning predicts, read as memory maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from repr.batch import Batch
from repr.distributed import gather, rank

CONTENT = "content.json"  # written last: columns with dtype, shape and bytes
READ = "read"  # (N,) uint8, whether the row could be read
EXACT = ("boxes",)  # columns that half precision would move
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


class TableWriter(pl.Callback):
    """Write what ``predict_step`` gives into ``<column>.npy``, each row at its place; the first process writes.

    Each process embeds its share of every batch; rows are gathered and put to their places by index, so that those
    which only fill up the last batch change nothing.

    Args:
        folder: an empty one; None on the other processes.
        rows: (N,) int64, rising: the indices of the data set, in the order of the table.
        dtype: ``float32`` or ``bfloat16``, of floating columns.
    """

    def __init__(self, folder: Path | None, rows: Tensor, dtype: str) -> None:
        self.folder, self.rows, self.dtype = folder, rows, dtype
        self.columns: dict[str, np.ndarray] = {}
        self.content: dict[str, Any] = {}

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch."""
        index = gather(batch["index"])
        gathered = {name: gather(values.contiguous()) for name, values in outputs.items()}
        if rank():
            return
        good = index >= 0  # negative: could not be read
        places = torch.searchsorted(self.rows, index[good].cpu()).numpy()
        gathered[READ] = torch.ones(len(index), dtype=torch.uint8, device=index.device)
        for name, values in gathered.items():
            column = self._column(name, values)
            column[places] = self._stored(name, values[good].cpu())

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Flush all columns and say what they are."""
        if self.folder is None:
            return
        for name, column in self.columns.items():
            column.flush()  # type: ignore[attr-defined]
            self.content[name]["bytes"] = (self.folder / f"{name}.npy").stat().st_size
        (self.folder / CONTENT).write_text(json.dumps(self.content, indent=1))

    def _column(self, name: str, values: Tensor) -> np.ndarray:
        if name not in self.columns:
            assert self.folder is not None
            floating = values.is_floating_point()
            dtype = ("float32" if name in EXACT else self.dtype) if floating else "uint8"
            shape = (len(self.rows), *values.shape[1:])
            on_disk = {"float32": np.float32, "bfloat16": np.uint16, "uint8": np.uint8}[dtype]
            self.content[name] = {"dtype": dtype, "shape": shape}
            self.columns[name] = np.lib.format.open_memmap(
                self.folder / f"{name}.npy", mode="w+", dtype=on_disk, shape=shape
            )
        return self.columns[name]

    def _stored(self, name: str, values: Tensor) -> np.ndarray:
        dtype = TYPES[self.content[name]["dtype"]]
        values = values.to(dtype)
        return values.view(torch.uint16).numpy() if dtype is torch.bfloat16 else values.numpy()


def damage(folder: Path) -> str | None:
    """What is wrong with a stored table, or None; a table that is not there is none."""
    try:
        content = json.loads((folder / CONTENT).read_text())
    except FileNotFoundError:
        return f"{folder / CONTENT} is missing"
    except ValueError:
        return f"{folder / CONTENT} is cut short"
    for name, column in content.items():
        path = folder / f"{name}.npy"
        size = path.stat().st_size if path.is_file() else 0
        if size != column["bytes"]:
            return f"{path} has {size} bytes of {column['bytes']}"
    return None


def read_columns(folder: Path) -> dict[str, Tensor]:
    """The columns of a stored table, mapped into memory: nothing is read before it is used."""
    content: Mapping[str, Any] = json.loads((folder / CONTENT).read_text())
    found = {}
    for name, column in content.items():
        # Copy on write: torch takes no read-only arrays, and nobody can change the file.
        values = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
        found[name] = values.view(torch.bfloat16) if column["dtype"] == "bfloat16" else values
    return found
