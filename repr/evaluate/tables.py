"""The feature tables that protocols read, whether they were gathered in memory or lie on disk."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repr.batch import Batch, Embeddings
from repr.data.datamodule import DataModule
from repr.data.datasets import class_ids
from repr.data.eval_datasets import CandidateDataset, DenseDataset, EvalDataset, RepeatedViews, TextDataset
from repr.data.fingerprint import of_texts
from repr.data.questions.compositional import Questions, compared, questions
from repr.data.sources.source import has_questions
from repr.data.views import View, expand
from repr.evaluate.encoder import Encoder
from repr.metrics.classes import Classes
from repr.metrics.features import DenseFeatures, Features
from repr.metrics.zero_shot import average_templates
from repr.models.backbone import feature_map

NO_TEXT = "the encoder has no text tower"
TRUNK, LOGITS = "trunk.", "logits."  # how columns of other poolings, and of heads, begin


class Request(NamedTuple):
    """A table that is wanted."""

    dataset: Callable[[], Any]  # what is embedded
    rows: Tensor  # (N,) int64, rising; what `index` of the batches may be
    told: str  # what messages call it
    set: str | None = None  # the evaluation set that its pictures belong to; None for texts


class Tables(ABC):
    """The tables of one encoder: protocols ask for them, all processes extract them, then protocols read them.

    ``precision`` is that of the encoder, as the Trainer calls it; features are kept in ``dtype``; ``seed`` is for
    held-out parts and the like.

    Attributes:
        cfg: the config of ``repr.evaluate``, for what trains a copy of the encoder; None during training.
        class_files: zero-shot classification chooses among them for a set that names none.
        device: where tables are read to.
        classes: set -> name of a number -> the classes that zero-shot classification has chosen.
        left_out: ``<set>/<key of the protocol>`` -> why it is not computed, or computed on fewer rows.
    """

    cfg: Any = None
    class_files: Sequence[Path] = ()
    _data: Mapping[str, str]  # set -> what tells its pictures from those of other sets

    def __init__(
        self, encoder: Encoder, data: DataModule, *, precision: str, dtype: str = "float32", seed: int = 0
    ) -> None:
        self.encoder, self.data, self.precision, self.dtype, self.seed = encoder, data, precision, dtype, seed
        self.device = torch.device("cpu")
        self.classes: dict[str, dict[str, Classes]] = {}
        self.left_out: dict[str, str] = {}
        self._wanted: dict[str, Request] = {}
        self._read: dict[str, Features] = {}
        self._labels: dict[str, dict[str, Tensor]] = {}
        self._questions: dict[str, Questions | None] = {}

    @property
    def sets(self) -> list[str]:
        """The names of the evaluation sets, without ``bank``, the rows of the training set."""
        return self.data.eval_names[1:]

    @cached_property
    def taken(self) -> dict[str, Any]:
        """How the features of pictures are taken, for the record of a number."""
        encoder = self.encoder
        words = {"resize": encoder.resize, "crop": encoder.crop, "interpolation": encoder.interpolation}
        pixels = {"resolution": encoder.image_size, **words, "mean": list(encoder.mean), "std": list(encoder.std)}
        return {**pixels, "precision": self.precision, "stored": self.dtype}

    @property
    def tokens(self) -> dict[str, Any]:
        """How texts become tokens, for the record of a number."""
        tokenizer: Any = self.encoder.tokenizer or self.encoder.caption_tokenizer
        return {"tokenizer": type(tokenizer).__name__, "context_length": getattr(tokenizer, "context_length", None)}

    @abstractmethod
    def extract(self) -> None:
        """Make the tables that were asked for and are not there; every process must call it."""

    @abstractmethod
    def _columns(self, key: str) -> dict[str, Tensor]:
        """Read the columns of the rows that could be embedded, and ``index``, which tells these rows."""

    @abstractmethod
    def _want_captions(self, name: str) -> str | None:
        """Ask for the embeddings of a set's pictures and captions, or say why there are none."""

    @abstractmethod
    def captioned(self, name: str) -> Features | None:
        """The rows of a set that have captions, with ``text``; None where there are none."""

    def want(self, need: str, name: str) -> str | None:
        """Ask for what a protocol ``needs`` of a set, or say why there is no such thing."""
        if need == "labels":
            return self._unlabelled(name)
        if need.startswith("captions"):
            why = NO_TEXT if self.encoder.tokenizer is None else self._want_captions(name)
            return why if need == "captions" else None
        if need == "questions":
            if (asked := self.questions(name)) is None:
                return f"{name} asks no questions" if self._reads else NO_TEXT
            if self.encoder.tokenizer is not None:
                self.want_texts(asked.texts, f"candidates of {name}")
            if self.encoder.caption_tokenizer is not None:
                self.want_likelihoods(name, asked)
            return None
        assert need in ("bank", "pictures"), f"a protocol needs {need}, which no table has"
        self.want_pictures("bank" if need == "bank" else name)
        return None

    def want_pictures(self, name: str) -> str:
        """Ask for the embeddings of a set's pictures; as all of its kind, it gives the key of the table."""
        source, rows = self.data.evaluated(name)
        no_labels, transform = torch.zeros(len(source), 0), self.encoder.transform
        request = Request(lambda: EvalDataset(source, rows, transform, no_labels, None), rows, name, name)
        return self._want(self._pictures(name), request)

    def want_texts(self, texts: Sequence[str], told: str = "texts") -> str:
        """Ask for the embeddings of texts, which messages call ``told``."""
        tokenizer, how = self.encoder.tokenizer, {"precision": self.precision, "stored": self.dtype}
        assert tokenizer is not None
        request = Request(partial(TextDataset, texts, tokenizer), torch.arange(len(texts)), told)
        return self._want(f"texts-{of_texts(texts)[:12]}-{short_hash(how)}", request)

    def want_likelihoods(self, name: str, asked: Questions) -> str:
        """Ask how likely a captioner finds the captions that each picture of a set is compared with."""
        source, rows = self.data.evaluated(name)
        places, tokenizer, transform = compared(asked), self.encoder.caption_tokenizer, self.encoder.transform
        assert tokenizer is not None
        pictures = EvalDataset(source, rows, transform, torch.zeros(len(source), 0), None)
        how = self.taken | {"texts": of_texts(asked.texts), "places": places.tolist()}
        request = Request(
            lambda: CandidateDataset(pictures, asked.texts, places, tokenizer), rows, f"captions of {name}", name
        )
        return self._want(f"likelihoods-{self._data[name]}-{short_hash(how)}", request)

    def want_maps(self, name: str, views: Mapping[str, View], num_images: int) -> str:
        """Ask for the feature maps of some pictures of a set and of two crops of each."""
        source, rows = self.data.evaluated(name, num_images)
        crops, size, masks = expand(views.values()), self.encoder.image_size, self.data.mask_classes
        pictures = partial(DenseDataset, source, rows, size, crops, masks)
        how = {"views": [str(view) for view in views.values()], "num_images": num_images, "masks": masks}
        key = f"maps-{self._data[name]}-{short_hash(self.taken | how)}"
        return self._want(key, Request(pictures, rows, f"feature maps of {name}", name))

    def want_views(self, name: str, view: View, num_samples: int, num_views: int) -> str:
        """Ask for the embeddings of several augmented views of some pictures of a set, drawn from the seed."""
        source, rows = self.data.evaluated(name, num_samples)
        places = torch.arange(len(rows) * num_views)
        views = partial(RepeatedViews, source, rows, num_views, view, self.seed)
        how = {"view": str(view), "samples": num_samples, "views": num_views, "seed": self.seed}
        key = f"views-{self._data[name]}-{short_hash(self.taken | how)}"
        return self._want(key, Request(views, places, f"views of {name}", name))

    def pictures(self, name: str) -> Features:
        """The table of a set, or of the ``bank``: rows that could be read, with their labels."""
        if name in self._read:
            return self._read[name]
        self._read = {kept: table for kept, table in self._read.items() if kept == "bank"}  # one set at a time
        columns = self._columns(self._pictures(name))
        if (labels := columns.get("label")) is None:
            source, _ = self.data.evaluated(name)
            labels = class_ids(source, self.data.attributes)[columns["index"].cpu()].to(self.device)
        tokens = columns.get("tokens")
        self._read[name] = Features(
            index=columns["index"],
            image=columns["image"],
            trunk=columns["trunk"],
            text=columns.get("text"),
            caption=None if tokens is None else tokens.unique(dim=0, return_inverse=True)[1],
            labels={attribute: labels[:, i] for i, attribute in enumerate(self.data.attributes)},
            poolings={key.removeprefix(TRUNK): x for key, x in columns.items() if key.startswith(TRUNK)},
            logits={key.removeprefix(LOGITS): x for key, x in columns.items() if key.startswith(LOGITS)},
        )
        return self._read[name]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (len, D)."""
        return self._columns(self.want_texts(texts))["text"]

    def likelihoods(self, name: str) -> tuple[Tensor, Tensor]:
        """The captions that are compared with each row of a set's source, and their log-likelihoods: (N, P) each.

        The first are positions in the texts of the questions, -1 for none; the second NaN where nothing was read.
        """
        asked = self.questions(name)
        assert asked is not None
        columns, places = self._columns(self.want_likelihoods(name, asked)), compared(asked)
        values = torch.full(places.shape, torch.nan, device=columns["index"].device)
        values[columns["index"]] = columns["likelihood"]
        return places, values.masked_fill(places.to(values.device) < 0, torch.nan)

    def class_embeddings(self, classes: Classes) -> tuple[Tensor, Tensor]:
        """Class embeddings (C, D), averaged over the templates, and the labels (C,) of the classes."""
        embeddings = self.texts(classes.sentences()).unflatten(0, (len(classes.names), len(classes.templates)))
        ids = classes.ids(self.data.attributes[classes.attribute])
        return average_templates(embeddings), torch.tensor(ids, device=embeddings.device)

    def maps(self, name: str, views: Mapping[str, View], num_images: int) -> DenseFeatures:
        """The feature maps of a set."""
        columns = self._columns(self.want_maps(name, views, num_images))
        planes = columns.get("mask")
        return DenseFeatures(
            index=columns["index"],
            maps=columns["maps"],
            crops=(columns["first"], columns["second"]),
            boxes=columns["boxes"],
            masks={} if planes is None else {mask: planes[:, i] for i, mask in enumerate(self.data.mask_classes)},
        )

    def views(self, name: str, view: View, num_samples: int, num_views: int) -> dict[str, Tensor]:
        """``image`` and ``trunk`` of the views of those pictures that could be read: (N, Q, D) each."""
        key = self.want_views(name, view, num_samples, num_views)
        columns = self._columns(key)
        read = torch.zeros(len(self._wanted[key].rows), dtype=torch.bool, device=columns["index"].device)
        read[columns["index"]] = True
        whole = read.view(-1, num_views).all(1)[columns["index"] // num_views]
        return {key: columns[key][whole].unflatten(0, (-1, num_views)) for key in ("image", "trunk")}

    def questions(self, name: str) -> Questions | None:
        """The questions of a set; None where its source has no questions, or the encoder reads no texts."""
        if name not in self._questions:
            source = self.data.eval[name]
            asks = self._reads and has_questions(source)
            self._questions[name] = questions(source) if asks else None  # type: ignore[arg-type]
        return self._questions[name]

    @property
    def _reads(self) -> bool:
        """Whether the encoder embeds texts, or says how likely they are."""
        return self.encoder.tokenizer is not None or self.encoder.caption_tokenizer is not None

    def labels(self, name: str) -> dict[str, Tensor]:
        """The labels of the evaluated rows, of each attribute that some of them have, also before extraction."""
        if name not in self._labels:
            source, rows = self.data.evaluated(name)
            ids = dict(zip(self.data.attributes, class_ids(source, self.data.attributes)[rows].T, strict=True))
            self._labels[name] = {attribute: labels for attribute, labels in ids.items() if (labels >= 0).any()}
        return self._labels[name]

    def shared_attributes(self, name: str) -> list[str]:
        """Attributes with two classes or more in a set, of which the bank has at least one."""
        known, asked = (
            {attribute: set(labels.tolist()) - {-1} for attribute, labels in self.labels(of).items()}
            for of in ("bank", name)
        )
        return [a for a, classes in asked.items() if len(classes) > 1 and classes & known.get(a, set())]

    def _unlabelled(self, name: str) -> str | None:
        """Say why no classifier of the bank's labels can be asked about a set, or give None."""
        if not self.labels(name):
            return f"{name} has no labels"
        if not self.labels("bank"):
            return "the training set has no labels"
        if not self.shared_attributes(name):
            return f"no attribute of {name} has two classes of which the training set has one"
        return None

    def _want(self, key: str, request: Request) -> str:
        self._wanted.setdefault(key, request)
        return key

    def _pictures(self, name: str) -> str:
        return f"pictures-{self._data[name]}-{short_hash(self.taken)}"


def short_hash(told: Any) -> str:
    """Hash what can be written as JSON, whatever the order of its keys, to eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def columns_of(embeddings: Embeddings) -> dict[str, Tensor]:
    """Turn what a flow gives for a batch into columns of a table, in float32."""
    columns = {"image": embeddings.image, "trunk": embeddings.trunk, "text": embeddings.text}
    columns |= {f"{TRUNK}{name}": pooled for name, pooled in embeddings.poolings.items()}
    columns |= {f"{LOGITS}{name}": logits for name, logits in embeddings.logits.items()}
    return {name: values.float() for name, values in columns.items() if values is not None}


def embed(module: Any, batch: Batch) -> dict[str, Tensor]:
    """Embed a batch on the device: its texts, its pictures or a view of each, or where there are crops maps of all."""
    if "crops" in batch:
        pictures = zip(("maps", "first", "second"), (batch["image"], *batch["crops"]), strict=True)
        columns = {name: feature_map(module.backbone, picture).float() for name, picture in pictures}
        return columns | {"boxes": batch["boxes"]} | ({"mask": batch["mask"]} if "mask" in batch else {})
    if "image" not in batch and "views" not in batch:
        return {"text": module.encode_text(batch["text"]).float()}
    if "candidates" in batch:
        return {"likelihood": module.log_likelihood(batch["image"], batch["candidates"]).float()}
    image = batch["image"] if "image" in batch else batch["views"][0]
    return columns_of(module.embed(Batch(image=image)))
