"""The protocols that learn nothing: of pictures and captions, classes, questions, feature maps, views and heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from torch import Tensor

from repr.config import ConfigError
from repr.data.views import View, expand
from repr.evaluate.protocol import Parts, Protocol, short_hash
from repr.evaluate.tables import NO_TEXT, Tables
from repr.metrics.captions import likelihood
from repr.metrics.classes import Classes, load_classes
from repr.metrics.classification import heads
from repr.metrics.codes import code_statistics
from repr.metrics.compositional import compositional
from repr.metrics.exhibits import Exhibits, NamedClasses, exhibits
from repr.metrics.features import one_caption
from repr.metrics.geometry import geometry, lidar
from repr.metrics.retrieval import retrieval
from repr.metrics.scores import MAJORITY
from repr.metrics.zero_shot import zero_shot


@dataclass
class Retrieval(Protocol):
    """Recall at k of pictures and captions that look for each other (:func:`repr.metrics.retrieval.retrieval`)."""

    ks: Sequence[int]
    memory: float
    positive = ("ks", "memory")
    said: ClassVar = {
        "features": "image, text",
        "similarity": "cosine",
        "ties": "count as failures",
        "chance": "a random order",
    }
    meanings: ClassVar = {
        "i2t_R@1": "Share of pictures whose nearest caption is theirs; higher is better.",
        "t2i_R@1": "Share of captions whose nearest picture is theirs; higher is better.",
        r"i2t_R@(\d+)": r"Share of pictures with a caption of theirs among their \1 nearest; higher is better.",
        r"t2i_R@(\d+)": r"Share of captions with a picture of theirs among their \1 nearest; higher is better.",
    }
    silent = ("memory",)
    needs = ("captions",)

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute both directions for the pictures that have captions."""
        query, captioned = tables.pictures(name), tables.captioned(name)
        assert captioned is not None
        if missing := len(query.image) - len(captioned.image):
            tables.left_out[f"{name}/{self.key}"] = f"{missing} of {len(query.image)} pictures have no caption"
        yield retrieval(captioned, **self.options), tables.tokens


@dataclass
class Geometry(Protocol):
    """Where the embeddings of pictures and captions lie on the sphere (:func:`repr.metrics.geometry.geometry`)."""

    chunk_size: int | None = None
    k: int | None = None
    num_splits: int | None = None
    max_pairs: int | None = None
    positive = ("chunk_size", "k", "num_splits", "max_pairs")
    said: ClassVar = {"features": "image, text (the first caption)"}
    meanings: ClassVar = {
        "uniformity": "Mean of uniformity_image and uniformity_text; lower is better.",
        r"uniformity_(.+)": r"How evenly the \1 embeddings cover the sphere, in nats; lower, more evenly, is better.",
        "cross_uniformity": "As uniformity, between pictures and captions of others, in nats; lower, apart, is better.",
        "alignment": "Mean squared distance of pictures and their captions on the sphere; lower is better.",
        "pair_cosine": "Mean cosine of pictures and their captions; higher is better.",
        "centroid_distance": "Distance of the mean picture from the mean caption, a gap; lower is better.",
        "modality_separability": "Accuracy of telling pictures from captions by a linear classifier; lower is better.",
        r"effective_rank_(.+)": r"Directions that the \1 embeddings fill, of at most their dimensions and the samples "
        "less one; higher is better.",
        r"rankme_(.+)": r"Directions that the \1 embeddings fill, a common mean included, of at most their dimensions "
        "and the samples; higher is better.",
        "hubness_.+": "Skewness of how often a sample is among the nearest of the others; lower is better, 0 is even.",
        "robin_hood_.+": "Share of finds to be given away until all samples are found equally often; lower is better.",
    }
    needs = ("pictures", "captions_if_any")

    def compute(self, tables: Tables, name: str) -> Parts:
        """Take the pictures that have captions, or all where none has."""
        captioned = tables.captioned(name)
        table = tables.pictures(name) if captioned is None else one_caption(captioned)
        yield geometry(table, **self.options), {} if captioned is None else tables.tokens


@dataclass
class Heads(Protocol):
    """Accuracy, F1 and AUC of the heads of a classifier (:func:`repr.metrics.classification.heads`)."""

    attribute: str | None
    said: ClassVar = {"features": "logits", "chance": MAJORITY}
    meanings: ClassVar = {
        r"(.+)_accuracy": r"Share of samples whose class the head \1 names; higher is better.",
        r"(.+)_f1_macro": r"F1 of the head \1, each class counted alike; higher is better.",
        r"(.+)_f1_weighted": r"F1 of the head \1, each sample counted alike; higher is better.",
        r"(.+)_auc": r"Area under the ROC curve of the head \1; higher is better.",
    }

    def compute(self, tables: Tables, name: str) -> Parts:
        """Score every head that has logits of the set."""
        query = tables.pictures(name)
        if not query.logits:
            tables.left_out[f"{name}/{self.key}"] = "the encoder has no heads that know classes"
        yield heads(query, **self.options), {}


@dataclass
class ZeroShot(Protocol):
    """Each picture goes to the class with the nearest sentences (:func:`repr.metrics.zero_shot.zero_shot`).

    ``classes`` names the class files of a set (:func:`repr.metrics.classes.load_classes`). A set that it does not name
    gets those of ``tables.class_files`` that name all its labels.
    """

    ks: Sequence[int]
    classes: Mapping[str, str | Sequence[str] | Mapping[str, str]] | None = None
    positive = ("ks",)
    said: ClassVar = {
        "features": "image",
        "similarity": "cosine",
        "class": "mean of the templates' unit embeddings",
        "chance": f"{MAJORITY}, of the k largest",
    }
    meanings: ClassVar = {
        r".+_top1": "Share of pictures whose class has the nearest sentences; higher is better.",
        r".+_top(\d+)": r"Share of pictures whose class is among the \1 with the nearest sentences; higher is better.",
    }
    silent = ("classes",)

    def __post_init__(self) -> None:
        self._given = {name: load_classes(files) for name, files in (self.classes or {}).items()}

    def fault(self, tables: Tables) -> str | None:
        """Refuse classes of a set that does not exist, or that the encoder cannot read."""
        if unknown := [name for name in self._given if name not in tables.sets]:
            known = ", ".join(tables.sets) or "none"
            return f"names the set '{unknown[0]}', and data.eval has {known}: set eval=default, or name one of these"
        if self._given and tables.encoder.tokenizer is None:
            return "needs a text tower and data.tokenizer: set them, or set it to null"
        return None

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for pictures and class sentences.

        Raises:
            ConfigError: a class file that is given does not name all labels of its set.
        """
        if tables.encoder.tokenizer is None:
            return NO_TEXT
        present = {
            attribute: [tables.data.attributes[attribute][label] for label in sorted(set(labels.tolist()) - {-1})]
            for attribute, labels in tables.labels(name).items()
        }
        if not (chosen := self._given.get(name)):
            fitting = [str(path) for path in tables.class_files if Classes.load(path).fault(present, name) is None]
            chosen = load_classes(fitting[0] if len(fitting) == 1 else fitting)
        if not chosen:
            return f"no class file names the labels of {name}: set eval.{self.key}.classes.{name} to one"
        for classes in chosen.values():
            if fault := classes.fault(present, name):
                raise ConfigError([f"eval.{self.key}.classes.{name}: {fault}"])
            tables.want_texts(classes.sentences(), f"sentences of the classes of {classes.attribute}")
        tables.classes[name] = chosen
        return super().want(tables, name)

    def compute(self, tables: Tables, name: str) -> Parts:
        """Classify by every class file of the set."""
        query = tables.pictures(name)
        for kind, classes in tables.classes[name].items():
            embeddings, ids = tables.class_embeddings(classes)
            known: Any = {"attribute": classes.attribute, "class_embeddings": embeddings, "class_labels": ids}
            values = zero_shot(query, ks=self.ks, name=kind, **known)
            facts = {"attribute": classes.attribute, "num_classes": len(classes.names), "templates": classes.templates}
            yield values, facts | {"classes": short_hash(list(classes.names.values())), **tables.tokens}


@dataclass
class Compositional(Protocol):
    """Which caption is true of a picture, and the reverse (:func:`repr.metrics.compositional.compositional`).

    A captioner has the scores by likelihood too (:func:`repr.metrics.captions.likelihood`), or alone.
    """

    said: ClassVar = {"features": "image, text", "similarity": "cosine", "ties": "count as failures"}
    meanings: ClassVar = {
        "num_items": "Questions that were asked.",
        "likelihood_(.+)": r"As \1, by how likely the decoder finds captions, not by cosines; higher is better.",
        "macro_(.+)": r"Mean of \1 over the splits; higher is better.",
        "text_score.*": "Share of questions whose pictures pick their captions; higher is better.",
        "image_score.*": "Share of questions whose captions pick their pictures; higher is better.",
        "group_score.*": "Share of questions with both text_score and image_score right; higher is better.",
    }
    needs = ("questions", "pictures")

    def compute(self, tables: Tables, name: str) -> Parts:
        """Score the questions, of all splits and of each."""
        query, asked = tables.pictures(name), tables.questions(name)
        assert asked is not None
        known: Any = {"candidates": asked.candidates, "items": asked.items}
        known |= {"attribute": asked.split, "names": tables.data.attributes[asked.split]}
        if tables.encoder.tokenizer is not None:
            yield compositional(query, captions=tables.texts(asked.texts), **known), tables.tokens
        if tables.encoder.caption_tokenizer is not None:
            texts, values = tables.likelihoods(name)
            told = {"features": "image, tokens", "similarity": "log-likelihood of the caption"}
            yield likelihood(query, texts=texts, values=values, **known), told | tables.tokens


@dataclass
class Dense(Protocol):
    """What feature maps know of their places: segmentation where there are masks, and correspondence.

    The maps and masks of all pictures are held at once: of 500 pictures of 224 pixels, 200 MB a set with the
    7 x 7 x 2,048 maps of a ResNet-50, and as much for each crop.

    Raises:
        ValueError: ``views`` are not two crops, or there is no picture.
    """

    metrics: Mapping[str, Any]  # name -> function ``(bank, query) -> values`` of DenseFeatures
    views: Mapping[str, Any]  # how two crops of each picture are drawn, as the views of training
    num_images: int  # at most so many pictures of each set, evenly spread
    positive = ("num_images",)
    said: ClassVar = {"features": "maps"}
    meanings: ClassVar = {
        r"(.+)_miou_(.+)": r"Mean intersection over union with the masks \2, of a \1 classifier; higher is better.",
        r"(.+)_pixels_(.+)": r"Share of pixels whose class in the masks \2 a \1 classifier names; higher is better.",
        r"correspondence@(.+)": r"Share of cells that find their place in another crop, to \1 cells; higher is better.",
    }
    silent = ("metrics",)

    def __post_init__(self) -> None:
        self._views: dict[str, View] = instantiate(self.views)
        num_crops = len(expand(self._views.values()))
        if num_crops != 2:
            raise ValueError(f"eval.dense.views gives {num_crops} crops; set it to two (count: 2)")

    def option_faults(self) -> Iterator[str]:
        """Look at the numbers of the metrics, too, all of which are above 0."""
        yield from super().option_faults()
        for kind, metric in self.metrics.items():
            for name, value in metric.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                    yield f"eval.{self.key}.metrics.{kind}.{name}={value}; set it above 0"

    def fault(self, tables: Tables) -> str | None:
        """Refuse an encoder without maps."""
        if hasattr(getattr(tables.encoder.module, "backbone", None), "forward_intermediates"):  # one of timm's
            return None
        return "needs feature maps, and the image tower gives none: set backbone.name to a timm ResNet, ConvNeXt or ViT"

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for maps of the set and the bank."""
        for of in ("bank", name):
            tables.want_maps(of, self._views, self.num_images)
        return None

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute every metric."""
        bank, query = (tables.maps(of, self._views, self.num_images) for of in ("bank", name))
        # Crops and masks are cut by one code for every encoder, whatever its own transform.
        cut = {"resize": "shorter side to the resolution", "crop": "centre", "interpolation": "bicubic"}
        for kind, metric in self.metrics.items():
            facts = {key: value for key, value in metric.items() if not key.startswith("_")}
            yield instantiate(metric)(bank, query), cut | {"dense": kind} | facts


@dataclass
class Codes(Protocol):
    """How the cells of feature maps use the codes of an encoder (:func:`repr.metrics.codes.code_statistics`).

    The module has ``codes(maps) -> (B, h, w)`` and ``num_codes``.
    """

    views: Mapping[str, Any]  # as those of :class:`Dense`, which need the same maps
    num_images: int  # at most so many pictures of each set, evenly spread
    positive = ("num_images",)
    said: ClassVar = {"features": "maps"}
    silent = ("views",)
    meanings: ClassVar = {
        "codes_used": "Share of the vocabulary that occurs; 0 is collapse.",
        "codes_entropy": "Of a cell's code, in nats; 0 is collapse, chance is all codes alike.",
        "codes_conditional_entropy": "Of a cell's code given its left neighbour's, in nats; below chance is structure.",
        "codes_zipf": "Exponent of Zipf's law of the codes' counts; 0 is all alike, 1 a text.",
        "codes_zipf_r2": "How straight the line of Zipf's law is; 1 is a law.",
        "codes_heaps": "Growth of the vocabulary with the cells that are read; 0 is one that was all used before.",
        "codes_compression": "Compressed size over that of equally likely codes; below chance is structure.",
        "codes_granularity_(.+)": r"V-measure of codes and \1; higher, up to 1, is what the codes tell.",
    }

    def __post_init__(self) -> None:
        self._views: dict[str, View] = instantiate(self.views)
        self._codes: dict[str, Tensor] = {}

    def fault(self, tables: Tables) -> str | None:
        """Refuse an encoder without codes or maps."""
        module: Any = tables.encoder.module
        if hasattr(module, "codes") and hasattr(module.backbone, "forward_intermediates"):
            return None
        return "needs codes of the cells of a timm model's feature map: set objective=swav or obow"

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for maps of the set."""
        tables.want_maps(name, self._views, self.num_images)
        return None

    @torch.no_grad()
    def prepare(self, tables: Tables) -> None:
        """Find the codes on all processes, since the encoder may be split over them."""
        module: Any = tables.encoder.module
        if self.fault(tables) is None:
            for name in tables.sets:
                maps = tables.maps(name, self._views, self.num_images).maps
                self._codes[name] = torch.cat([module.codes(part.to(module.device)) for part in maps.split(32)])

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute the statistics."""
        masks = tables.maps(name, self._views, self.num_images).masks
        module: Any = tables.encoder.module
        facts = {"num_codes": module.num_codes}
        yield code_statistics(self._codes.pop(name), masks=masks, **facts), facts


@dataclass
class LiDAR(Protocol):
    """The rank of what tells pictures apart against what tells views apart (:func:`repr.metrics.geometry.lidar`)."""

    num_samples: int  # pictures of each set at most, evenly spread
    num_views: int  # of each picture
    view: Mapping[str, Any]  # how each is drawn
    delta: float  # in the units of the features' variance
    positive = ("num_samples", "num_views", "delta")
    meanings: ClassVar = {
        "lidar_(.+)": r"Directions of \1 in which pictures differ by more than their views; higher is better."
    }

    def _wanted(self) -> dict[str, Any]:
        return {"view": instantiate(self.view), "num_samples": self.num_samples, "num_views": self.num_views}

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for augmented views."""
        if len(tables.data.eval[name]) < 2:
            return f"{name} has one picture"
        tables.want_views(name, **self._wanted())
        return None

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute the rank of the embeddings and of the trunk."""
        views = tables.views(name, **self._wanted())
        # Views are cut by one code for every encoder, whatever its own transform.
        facts: dict[str, Any] = {"resize": "none", "crop": "drawn", "interpolation": "bicubic", "seed": tables.seed}
        facts["view"] = {key: value for key, value in self.view.items() if not key.startswith("_")}
        facts["num_samples"] = len(views["image"])
        for features, table in views.items():
            yield {f"lidar_{features}": lidar(table, delta=self.delta)}, facts | {"features": features}


@dataclass
class ForReport(Protocol):
    """No numbers: map, nearest neighbours, confusions and spectrum (:func:`repr.metrics.exhibits.exhibits`)."""

    num_points: int
    num_queries: int | None = None
    num_nearest: int | None = None
    positive = ("num_points", "num_queries", "num_nearest")
    needs = ("bank", "pictures", "captions_if_any")

    def show(self, tables: Tables, name: str) -> Exhibits:
        """Make the exhibits of a set, with the classes that zero-shot classification has chosen."""
        query, captioned = tables.pictures(name), tables.captioned(name)
        # Only where every picture has a caption do both tables have the same rows.
        if captioned is not None and len(captioned.image) == len(query.image):
            query = replace(query, text=captioned.text, pairs=captioned.pairs)
        named = {
            kind: NamedClasses(classes.attribute, *tables.class_embeddings(classes), names=list(classes.names.values()))
            for kind, classes in tables.classes.get(name, {}).items()
        }
        attributes = tables.data.attributes
        return exhibits(tables.pictures("bank"), query, attributes=attributes, classes=named, **self.options)
