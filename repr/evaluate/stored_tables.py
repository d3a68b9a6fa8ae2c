"""Feature tables of one encoder: extracted once, by all processes together, and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from repr.batch import Batch
from repr.cli import is_first
from repr.data.bad_rows import too_many_bad
from repr.data.datamodule import DataModule
from repr.data.fingerprint import captions_of, of_rows
from repr.distributed import gather_objects, on_first, rank
from repr.evaluate.encoder import Encoder
from repr.evaluate.stored_features import READ, TableWriter, damage, read_columns
from repr.evaluate.tables import Request, Tables, embed
from repr.files import replacing_folder
from repr.metrics.features import Features
from repr.training.trainer import make_trainer

_log = logging.getLogger(__name__)


class Extractor(pl.LightningModule):
    """The module of an encoder behind the Trainer; loaders and the device half of batches are those of ``data``."""

    def __init__(self, module: Any, data: DataModule) -> None:
        super().__init__()
        self.module, self.data = module, data
        self.dataset: Any = None
        self.bad: dict[int, str] = {}

    def predict_dataloader(self) -> Any:
        """This rank's share of each batch of the data set at hand."""
        self.data.trainer = self.trainer
        return self.data.in_order(self.dataset)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; rows that could not be read are logged and noted."""
        for row, fault in batch.pop("bad", []):
            self.bad[row] = fault
            _log.warning("sample %d left out: %s", row, fault)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Colour and normalise pixels, unless the encoder's own transform has done it."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The columns of a table."""
        return embed(self.module, batch)


class StoredTables(Tables):
    """Tables on disk, each in a folder below ``folder`` that hashes of weights, data and how they are taken name."""

    def __init__(
        self, encoder: Encoder, data: DataModule, cfg: DictConfig, folder: Path, class_files: Sequence[Path] = ()
    ) -> None:
        super().__init__(encoder, data, precision=str(cfg.trainer.precision), dtype=cfg.features, seed=cfg.seed)
        self.cfg, self.folder, self.class_files = cfg, folder, class_files
        self.model_hash = hash_module(encoder.module)
        self.data_hash = {name: of_rows(*data.evaluated(name)) for name in data.eval_names}
        self._data = {name: data_hash[:12] for name, data_hash in self.data_hash.items()}
        self._captions: dict[str, tuple[list[str], Tensor]] = {}

    def _want_captions(self, name: str) -> str | None:
        if name not in self._captions:
            self._captions[name] = captions_of(*self.data.evaluated(name))
        texts, _ = self._captions[name]
        if not texts:
            return f"{name} has no captions"
        self.want_pictures(name)
        self.want_texts(texts, f"captions of {name}")
        return None

    def captioned(self, name: str) -> Features | None:
        """The rows that have captions, with all of them."""
        texts, pairs = self._captions.get(name, ([], torch.empty(0, 2)))
        if not texts:
            return None
        query, good = self.pictures(name), self._good(self._pictures(name))
        pairs = pairs[good[pairs[:, 0]]]
        row_of_table = good.cumsum(0) - 1
        rows, image_row = row_of_table[pairs[:, 0]].unique(return_inverse=True)
        kept, text_row = pairs[:, 1].unique(return_inverse=True)
        rows, pairs = rows.to(self.device), torch.stack([image_row, text_row], 1).to(self.device)
        text = self.texts(texts)[kept.to(self.device)]
        return Features(query.index[rows], query.image[rows], query.trunk[rows], text=text, pairs=pairs)

    def told(self) -> dict[str, dict[str, Any]]:
        """Rows and hash of every set, and how many rows could not be read where its table was asked for."""
        told: dict[str, dict[str, Any]] = {}
        for name, data_hash in self.data_hash.items():
            told[name] = {"rows": len(self.data.evaluated(name)[1]), "hash": data_hash}
            if (key := self._pictures(name)) in self._wanted:
                told[name]["unread"] = int((~self._good(key)).sum())
        return told

    def extract(self) -> None:
        """See :class:`repr.evaluate.tables.Tables`.

        Raises:
            ValueError: too many rows of a set cannot be read.
        """
        extractor = Extractor(self.encoder.module, self.data)
        for key, request in self._wanted.items():
            folder = self._folder(key)
            fault = on_first(lambda folder=folder: damage(folder) if folder.is_dir() else "")  # type: ignore[misc]
            if fault and not rank():
                print(f"extracted anew: {fault}")
            if fault is not None:
                self._extract(folder, request, extractor)

    def _extract(self, folder: Path, request: Request, extractor: Extractor) -> None:
        with replacing_folder(folder) if is_first() else nullcontext() as new:
            writer = TableWriter(request.rows, self.dtype, new)
            progress = [instantiate(node) for node in self.cfg.callbacks.values() if node]
            trainer = make_trainer(self.cfg, [writer, *progress], [])
            extractor.dataset, extractor.bad = request.dataset(), {}
            trainer.predict(extractor, return_predictions=False)
            self.device = trainer.strategy.root_device
            bad = {row: fault for part in gather_objects(extractor.bad) for row, fault in part.items()}
            if len(bad) > self.data.max_bad_fraction * len(request.rows):
                raise ValueError(too_many_bad(request.told, bad, len(request.rows)))

    def _columns(self, key: str) -> dict[str, Tensor]:
        columns = read_columns(self._folder(key))
        good = columns.pop(READ).bool()
        for name, values in columns.items():
            values = (values if good.all() else values[good]).to(self.device)
            columns[name] = values.float() if values.is_floating_point() else values
        return columns | {"index": self._wanted[key].rows[good].to(self.device)}

    def _good(self, key: str) -> Tensor:
        """(N,) bool, which rows of a table could be read."""
        return read_columns(self._folder(key))[READ].bool()

    def _folder(self, key: str) -> Path:
        kind, _, rest = key.partition("-")
        return self.folder / f"{kind}-{self.model_hash[:12]}-{rest}"


def hash_module(module: nn.Module) -> str:
    """Hash every tensor of an encoder's state, and how its layers print, to 64 hexadecimal digits."""
    digest = hashlib.sha256(str(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
