"""The columns of a feature table, written row by row while Lightning predicts: on disk, or in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from repr.batch import Batch
from repr.distributed import gather, rank
from repr.files import checksum

CONTENT = "content.json"  # written last: columns with dtype, shape and checksum
READ = "read"  # (N,) uint8, whether the row could be read
EXACT = ("boxes", "likelihood")  # columns that half precision would move
TYPES = {  # in the table, and as numpy has them
    "float32": (torch.float32, np.float32), "bfloat16": (torch.bfloat16, np.uint16), "uint8": (torch.uint8, np.uint8)
}  # fmt: skip


class TableWriter(pl.Callback):
    """Put what ``predict_step`` gives for each row at its place, on the first process.

    Rows are put to their places by index, so that those which only fill up the last batch change nothing. Rows that
    could not be read are zero.

    Args:
        rows: (N,) int64, rising: the indices of the data set, in the order of the table.
        dtype: ``float32`` or ``bfloat16``, of floating columns.
        folder: an empty one for the columns, ``<column>.npy``; None: they are in memory.
        select: gives the columns of a batch from what ``predict_step`` gives.

    Attributes:
        columns: name -> (N, ...), and ``READ``; empty on the other processes.
    """

    def __init__(
        self,
        rows: Tensor,
        dtype: str = "float32",
        folder: Path | None = None,
        select: Callable[[Any], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.rows, self.dtype, self.folder, self.select = rows, dtype, folder, select
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
        gathered = {name: gather(values.contiguous()) for name, values in self.select(outputs).items()}
        if rank():
            return
        good = index >= 0  # negative: could not be read
        places = torch.searchsorted(self.rows, index[good].cpu()).numpy()
        gathered[READ] = torch.ones(len(index), dtype=torch.uint8, device=index.device)
        for name, values in gathered.items():
            column = self._column(name, values)
            stored = values[good].cpu().to(TYPES[self.content[name]["dtype"]][0])
            column[places] = (stored.view(torch.uint16) if stored.dtype is torch.bfloat16 else stored).numpy()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Flush all columns on disk and say what they are."""
        if self.folder is None:
            return
        for name, column in self.columns.items():
            column.flush()  # type: ignore[attr-defined]
            self.content[name]["checksum"] = checksum(self.folder / f"{name}.npy")
        (self.folder / CONTENT).write_text(json.dumps(self.content, indent=1))

    def _column(self, name: str, values: Tensor) -> np.ndarray:
        if name not in self.columns:
            floating = "float32" if name in EXACT else self.dtype
            dtype = floating if values.is_floating_point() else "uint8"
            shape, array_type = (len(self.rows), *values.shape[1:]), TYPES[dtype][1]
            self.content[name] = {"dtype": dtype, "shape": shape}
            if self.folder is None:
                self.columns[name] = np.zeros(shape, array_type)
            else:
                path = self.folder / f"{name}.npy"
                self.columns[name] = np.lib.format.open_memmap(path, mode="w+", dtype=array_type, shape=shape)
                if hasattr(
                    os, "posix_fallocate"
                ):  # on a full disk a write to a hole of a mapped file kills the process
                    with path.open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return self.columns[name]


def damage(folder: Path) -> str | None:
    """Say what is missing or changed in a stored table, of which every byte is read; None: nothing."""
    try:
        content = json.loads((folder / CONTENT).read_text())
    except FileNotFoundError:
        return f"{folder / CONTENT} is missing"
    except ValueError:
        return f"{folder / CONTENT} is cut short"
    for name, column in content.items():
        path = folder / f"{name}.npy"
        if not path.is_file() or checksum(path) != column.get("checksum"):
            return f"{path} is not the file that was written"
    return None


def read_columns(folder: Path) -> dict[str, Tensor]:
    """The columns of a stored table, mapped into memory: nothing is read before it is used."""
    columns = {}
    for name, column in json.loads((folder / CONTENT).read_text()).items():
        # Copy on write: torch takes no read-only arrays, and nobody can change the file.
        values = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
        columns[name] = values.view(torch.bfloat16) if column["dtype"] == "bfloat16" else values
    return columns
