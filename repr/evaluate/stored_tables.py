"""Feature tables of one encoder: extracted once, by all processes together, and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from repr.batch import Batch
from repr.data.bad_rows import too_many_bad
from repr.data.datamodule import DataModule
from repr.data.fingerprint import captions_of, of_rows
from repr.distributed import gather_objects, on_first, rank
from repr.evaluate.encoder import Encoder
from repr.evaluate.stored_features import READ, TableWriter, damage, read_columns
from repr.evaluate.tables import NO_TEXT, Request, Tables, embed
from repr.files import replacing_folder
from repr.metrics.features import Features
from repr.training.trainer import make_trainer

_log = logging.getLogger(__name__)


class Extractor(pl.LightningModule):
    """An encoder behind the Trainer: embeds batches of pictures, of texts, of views, and of pictures with crops.

    Args:
        module: of the encoder.
        data: whose loader options and device half are used.
    """

    def __init__(self, module: Any, data: DataModule) -> None:
        super().__init__()
        self.module, self.data = module, data
        self.dataset: Any = None
        self.bad: dict[int, str] = {}

    def predict_dataloader(self) -> Any:
        """Batches of the data set at hand; this rank's share of each."""
        self.data.trainer = self.trainer
        return self.data.in_order(self.dataset)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As Lightning's; rows that could not be read are told once, and noted."""
        for row, fault in batch.pop("bad", []):
            self.bad[row] = fault
            _log.warning("sample %d left out: %s", row, fault)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Pixels are coloured and normalised, unless the encoder's own transform has done it."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The columns of a table."""
        return embed(self.module, batch)


class StoredTables(Tables):
    """Tables that are kept on disk, a folder each, named by the hashes of the weights, the data and how they are taken.

    Args:
        encoder: what is evaluated.
        data: the sets, normalised for the encoder.
        cfg: a whole config of ``repr.evaluate``.
        folder: where tables are kept.
        class_files: see :class:`repr.evaluate.tables.Tables`.
    """

    cfg: DictConfig

    def __init__(
        self, encoder: Encoder, data: DataModule, cfg: DictConfig, folder: Path, class_files: Sequence[Path] = ()
    ) -> None:
        options: Any = {"precision": str(cfg.trainer.precision), "dtype": cfg.features, "seed": cfg.seed}
        super().__init__(encoder, data, class_files=class_files, **options)
        self.cfg, self.folder = cfg, folder
        self.model_hash = hash_module(encoder.module)
        self.data_hash = {name: of_rows(*data.evaluated(name)) for name in data.eval_names}
        self._captions: dict[str, tuple[list[str], Tensor]] = {}

    def want_captions(self, name: str) -> str | None:
        """See :class:`repr.evaluate.tables.Tables`."""
        if self.encoder.tokenizer is None:
            return NO_TEXT
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
        query, read = self.pictures(name), self._good(self._pictures(name))
        place = torch.full((len(read),), -1)  # position in the set -> row of the table
        place[read] = torch.arange(int(read.sum()))
        pairs = torch.stack([place[pairs[:, 0]], pairs[:, 1]], 1)
        rows, image_row = pairs[pairs[:, 0] >= 0, 0].unique(return_inverse=True)
        kept, text_row = pairs[pairs[:, 0] >= 0, 1].unique(return_inverse=True)
        rows, pairs = rows.to(self.device), torch.stack([image_row, text_row], 1).to(self.device)
        text = self.texts(texts)[kept.to(self.device)]
        return Features(query.index[rows], query.image[rows], query.trunk[rows], text=text, pairs=pairs)

    def told(self) -> dict[str, dict[str, Any]]:
        """Rows and hash of every set, and how many rows could not be read, as far as its table was asked for."""
        told: dict[str, dict[str, Any]] = {}
        for name, data_hash in self.data_hash.items():
            told[name] = {"rows": len(self.data.evaluated(name)[1]), "hash": data_hash}
            if (key := self._pictures(name)) in self._wanted:
                told[name]["unread"] = int((~self._good(key)).sum())
        return told

    def extract(self) -> None:
        """Make those tables that are not there; every rank must call it.

        Raises:
            ValueError: too many rows of a set cannot be read.
        """
        extractor = None
        for key, request in self._wanted.items():
            folder = self._folder(key)
            fault = on_first(lambda folder=folder: damage(folder) if folder.is_dir() else "")  # type: ignore[misc]
            if fault is None:
                continue
            if fault and not rank():
                print(f"extracted anew: {fault}")
            extractor = extractor or Extractor(self.encoder.module, self.data)
            self._extract(folder, request, extractor)

    def _extract(self, folder: Path, request: Request, extractor: Extractor) -> None:
        from hydra.utils import instantiate

        first = pl.utilities.rank_zero_only.rank in (None, 0)  # type: ignore[attr-defined]
        with ExitStack() as stack:
            new = stack.enter_context(replacing_folder(folder)) if first else None
            writer = TableWriter(new, request.rows, self.dtype)
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
        ready = {name: self._ready(values, good) for name, values in columns.items()}
        return ready | {"index": self._wanted[key].rows[good].to(self.device)}

    def _ready(self, values: Tensor, good: Tensor) -> Tensor:
        values = (values if good.all() else values[good]).to(self.device)
        return values.float() if values.is_floating_point() else values

    def _good(self, key: str) -> Tensor:
        """(N,) bool, which rows of a table could be read."""
        return read_columns(self._folder(key))[READ].bool()

    def _data(self, name: str) -> str:
        return self.data_hash[name][:12]

    def _folder(self, key: str) -> Path:
        kind, _, rest = key.partition("-")
        return self.folder / f"{kind}-{self.model_hash[:12]}-{rest}"


def hash_module(module: nn.Module) -> str:
    """A hash of an encoder: every tensor of its state, and how its layers print; 64 hexadecimal digits."""
    digest = hashlib.sha256(str(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
