"""Feature tables of one encoder: extracted once, by all processes together, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError
from repr.data.colour import colour_views, normalise
from repr.data.datamodule import DataModule
from repr.data.datasets import class_ids, too_many_bad
from repr.data.eval_datasets import DenseDataset, EvalDataset, RepeatedViews, TextDataset
from repr.data.fingerprint import of_rows, of_texts
from repr.data.views import View, expand
from repr.distributed import gather_objects, on_first, rank
from repr.evaluate.foreign import Encoder
from repr.evaluate.stored_features import READ, TableWriter, damage, read_columns
from repr.files import replacing_folder
from repr.metrics.features import DenseFeatures, Features
from repr.models.backbone import feature_map
from repr.training.trainer import make_trainer

_log = logging.getLogger(__name__)


class Extractor(pl.LightningModule):
    """An encoder behind the Trainer: embeds batches of pictures, of texts, of views, and of pictures with crops.

    Args:
        encoder: what is evaluated.
        data: whose loader options are used.
    """

    def __init__(self, encoder: Encoder, data: DataModule) -> None:
        super().__init__()
        self.module: Any = encoder.module
        self.mean, self.std = encoder.mean, encoder.std
        self.data = data
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

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The columns of a table."""
        if "text" in batch:
            return {"text": self.module.encode_text(batch["text"]).float()}
        if "views" in batch:
            (batch["image"],) = colour_views(batch.pop("views"), batch["colour"], self.mean, self.std)
        for key in ("image", "crops"):
            if key in batch:
                batch[key] = _normalised(batch[key], self.mean, self.std)
        if "crops" in batch:
            pictures = zip(("maps", "first", "second"), (batch["image"], *batch["crops"]), strict=True)
            maps = {name: feature_map(self.module.backbone, picture).float() for name, picture in pictures}
            return maps | {key: batch[key] for key in ("boxes", "mask") if key in batch}
        return {name: values.float() for name, values in self.module.embed(batch).items()}


def _normalised(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    if isinstance(pixels, list):
        return [_normalised(part, mean, std) for part in pixels]
    return pixels if pixels.is_floating_point() else normalise(pixels, mean, std)


@dataclass(frozen=True)
class Request:
    """A table that is wanted: where it is kept, and what fills it."""

    folder: Path
    dataset: Callable[[], Any]
    rows: Tensor  # (N,) int64, rising
    name: str  # for messages


class FeatureTables:
    """The tables of an encoder; ask for them with :meth:`want`, extract, then read them.

    Args:
        encoder: what is evaluated.
        data: the sets.
        cfg: a whole config of ``repr.evaluate``, for the trainer.
        folder: where tables are kept, a folder each, named by the hashes of the weights, of the data and of how the
            features are taken.
        dtype: ``float32`` or ``bfloat16``, on disk.
    """

    def __init__(self, encoder: Encoder, data: DataModule, cfg: DictConfig, folder: Path, dtype: str) -> None:
        self.encoder, self.data, self.cfg, self.folder, self.dtype = encoder, data, cfg, folder, dtype
        self.model_hash = hash_module(encoder.module)
        self.data_hash = {name: of_rows(*data.evaluated(name)) for name in data.eval_names}
        self._wanted: dict[Path, Request] = {}
        self.device = torch.device("cpu")

    @property
    def taken(self) -> dict[str, Any]:
        """How the features of pictures are taken."""
        return {**self.encoder.preprocessing, "precision": str(self.cfg.trainer.precision), "stored": self.dtype}

    def want_pictures(self, name: str) -> None:
        """Ask for the embeddings of a set's pictures."""
        source, rows = self.data.evaluated(name)
        labels = torch.zeros(len(source), 0)
        size, transform = self.encoder.image_size, self.encoder.transform
        self._want(
            self._pictures(name), lambda: EvalDataset(source, rows, size, labels, None, transform), rows, f"{name}"
        )

    def want_texts(self, texts: Sequence[str], name: str) -> None:
        """Ask for the embeddings of texts."""
        tokenizer = self.encoder.tokenizer
        assert tokenizer is not None
        self._want(self._texts(texts), lambda: TextDataset(texts, tokenizer), torch.arange(len(texts)), name)

    def want_maps(self, name: str, views: Mapping[str, View], num_images: int) -> None:
        """Ask for the feature maps of some pictures of a set and of two crops of each."""
        source, rows = self.data.evaluated(name, num_images)
        crops, masks = expand(views.values()), self.data.mask_classes
        self._want(
            self._maps(name, views, num_images),
            lambda: DenseDataset(source, rows, self.encoder.image_size, crops, masks),
            rows,
            f"feature maps of {name}",
        )

    def want_views(self, name: str, view: View, num_samples: int, num_views: int, seed: int) -> None:
        """Ask for the embeddings of several augmented views of some pictures of a set."""
        source, rows = self.data.evaluated(name, num_samples)
        self._want(
            self._views(name, view, num_samples, num_views, seed),
            lambda: RepeatedViews(source, rows, num_views, view, seed),
            torch.arange(len(rows) * num_views),
            f"views of {name}",
        )

    def extract(self) -> None:
        """Make those tables that are not there; every rank must call it.

        Raises:
            ValueError: too many rows of a set cannot be read.
        """
        extractor = None
        for request in self._wanted.values():
            fault = on_first(lambda folder=request.folder: damage(folder) if folder.is_dir() else "")  # type: ignore[misc]
            if fault is None:
                continue
            if fault and not rank():
                print(f"extracted anew: {fault}")
            extractor = extractor or Extractor(self.encoder, self.data)
            self._extract(request, extractor)

    def _extract(self, request: Request, extractor: Extractor) -> None:
        from hydra.utils import instantiate

        first = pl.utilities.rank_zero_only.rank in (None, 0)  # type: ignore[attr-defined]
        with ExitStack() as stack:
            folder = stack.enter_context(replacing_folder(request.folder)) if first else None
            writer = TableWriter(folder, request.rows, self.dtype)
            progress = [instantiate(node) for node in self.cfg.callbacks.values() if node]
            trainer = make_trainer(self.cfg, [writer, *progress], [])
            extractor.dataset, extractor.bad = request.dataset(), {}
            trainer.predict(extractor, return_predictions=False)
            self.device = trainer.strategy.root_device
            bad = {row: fault for part in gather_objects(extractor.bad) for row, fault in part.items()}
            if len(bad) > self.data.max_bad_fraction * len(request.rows):
                raise ValueError(too_many_bad(request.name, bad, len(request.rows)))

    def pictures(self, name: str) -> Features:
        """The table of a set: rows that were read, with their labels."""
        columns = read_columns(self._pictures(name))
        source, rows = self.data.evaluated(name)
        good = columns.pop(READ).bool()
        found = {key: self._ready(values, good) for key, values in columns.items()}
        labels = class_ids(source, self.data.attributes)[rows[good]].to(self.device)
        return Features(
            index=rows[good].to(self.device),
            image=found["image"],
            trunk=found["trunk"],
            labels={attribute: labels[:, i] for i, attribute in enumerate(self.data.attributes)},
            poolings={key.removeprefix("trunk."): x for key, x in found.items() if key.startswith("trunk.")},
        )

    def read(self, name: str) -> Tensor:
        """(N,) bool, which rows of a set could be read."""
        return read_columns(self._pictures(name))[READ].bool()

    def told(self) -> dict[str, dict[str, Any]]:
        """Rows and hash of every set, and how many rows could not be read, as far as its table was asked for."""
        found: dict[str, dict[str, Any]] = {}
        for name, data_hash in self.data_hash.items():
            found[name] = {"rows": len(self.data.evaluated(name)[1]), "hash": data_hash}
            if self._pictures(name) in self._wanted:
                found[name]["unread"] = int((~self.read(name)).sum())
        return found

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts: (len, D)."""
        return self._ready(read_columns(self._texts(texts))["text"])

    def maps(self, name: str, views: Mapping[str, View], num_images: int) -> DenseFeatures:
        """The feature maps of a set."""
        columns = read_columns(self._maps(name, views, num_images))
        _, rows = self.data.evaluated(name, num_images)
        good = columns.pop(READ).bool()
        found = {key: self._ready(values, good) for key, values in columns.items()}
        planes = {} if "mask" not in found else {m: found["mask"][:, i] for i, m in enumerate(self.data.mask_classes)}
        crops = found["first"], found["second"]
        return DenseFeatures(rows[good].to(self.device), found["maps"], crops, found["boxes"], planes)

    def views(self, name: str, view: View, num_samples: int, num_views: int, seed: int) -> dict[str, Tensor]:
        """``image`` and ``trunk`` of the views of those pictures that could be read: (N, Q, D) each."""
        columns = read_columns(self._views(name, view, num_samples, num_views, seed))
        good = columns.pop(READ).view(-1, num_views).bool().all(1)
        return {key: self._ready(columns[key].unflatten(0, (-1, num_views)), good) for key in ("image", "trunk")}

    def _ready(self, values: Tensor, good: Tensor | None = None) -> Tensor:
        if good is not None and not good.all():
            values = values[good]
        values = values.to(self.device)
        return values.float() if values.is_floating_point() else values

    def _want(self, folder: Path, dataset: Callable[[], Any], rows: Tensor, name: str) -> None:
        self._wanted.setdefault(folder, Request(folder, dataset, rows, name))

    def _pictures(self, name: str) -> Path:
        return self._path("pictures", self.data_hash[name], self.taken)

    def _texts(self, texts: Sequence[str]) -> Path:
        precision = str(self.cfg.trainer.precision)
        return self._path("texts", of_texts(texts), {"precision": precision, "stored": self.dtype})

    def _maps(self, name: str, views: Mapping[str, View], num_images: int) -> Path:
        told = self.taken | {"views": [str(view) for view in views.values()], "num_images": num_images}
        return self._path("maps", self.data_hash[name], told | {"masks": self.data.mask_classes})

    def _views(self, name: str, view: View, num_samples: int, num_views: int, seed: int) -> Path:
        told = self.taken | {"view": str(view), "samples": num_samples, "views": num_views, "seed": seed}
        return self._path("views", self.data_hash[name], told)

    def _path(self, kind: str, of_data: str, how: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{self.model_hash[:12]}-{of_data[:12]}-{short_hash(how)}"


def hash_module(module: nn.Module) -> str:
    """A hash of an encoder: every tensor of its state, and how its layers print; 64 hexadecimal digits."""
    found = hashlib.sha256(str(module).encode())
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def short_hash(told: Any) -> str:
    """Eight hexadecimal digits of what can be written as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def maps_fault(encoder: Encoder) -> str | None:
    """Why an encoder has no feature maps, or None."""
    backbone = getattr(encoder.module, "backbone", None)
    if hasattr(backbone, "forward_intermediates"):
        return None
    return "the encoder gives no feature maps: its image tower is not one of timm's with maps"


def check_dtype(dtype: str) -> None:
    """Raise for a type that tables are not stored in.

    Raises:
        ConfigError: it is none.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError([f"features={dtype}; set it to float32 or bfloat16"])
