"""The DataModule: sources and views -> batches, the same ones for every number of workers and ranks."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from repr.batch import Batch, evenly_spread
from repr.data.bad_rows import BadRows
from repr.data.cluster_order import ClusterOrder
from repr.data.clusters import Clusters
from repr.data.colour import colour_views, normalise
from repr.data.datasets import Tokenizer, TrainDataset, class_ids, rows_further_on, vocabulary
from repr.data.distorted_captions import DistortedCaptions
from repr.data.epoch_order import EpochOrder, Order
from repr.data.eval_datasets import EvalDataset
from repr.data.hard_captions import HardCaptions
from repr.data.neighbours import NeighbourOrder, Neighbours
from repr.data.samplers import EpochBatchSampler, EvalBatchSampler, position
from repr.data.shard_order import ShardOrder
from repr.data.sources.numeric_tables import gather_tables
from repr.data.sources.source import (
    Source,
    blocks_of,
    first_rows,
    has_captions,
    has_pictures,
    mask_vocabulary,
    parts_of,
    row_weights_of,
    tables_of,
)
from repr.data.views import View, evaluation_view, expand
from repr.data.weighted_order import WeightedOrder
from repr.data.workers import Loader


class DataModule(LightningDataModule):
    """Training batches of augmented views, and evaluation batches of every named data set.

    Evaluation runs over ``bank`` (rows of the training set, for nearest neighbours and probes) and then over the sets
    of ``eval``. Use it with ``Trainer(use_distributed_sampler=False)``.

    Args:
        train: the training set.
        eval: name -> evaluation set; None: nothing is evaluated.
        views: name -> view, large ones first; without any, no pictures are read.
        batch_size: samples of a training batch, of all ranks together.
        eval_batch_size: samples of an evaluation batch, likewise.
        image_size: side of evaluation images in pixels.
        seed: everything random is a function of it, the epoch and the row.
        mean: of the three channels, of pixels in [0, 1].
        std: likewise.
        tokenizer: list of B texts -> (B, L) int64; None for images only.
        num_workers: worker processes a rank and loader.
        bank_size: at most this many rows of the training set are the bank, evenly spread, without second ones of a
            picture; None takes all.
        clusters: of the training set; if given, each batch holds rows of one of them.
        lanes: if given, training reads each shard about once an epoch instead of shuffling all rows, and a batch takes
            as many rows of each of so many lanes of shards; see :class:`repr.data.shard_order.ShardOrder`.
        window: shards of a lane that are mixed.
        neighbours: ``items``, or a file of :func:`repr.data.neighbours.save_neighbours`: each row of the training set
            stands beside a neighbour of its own, another row of its item or one of those in the file.
        hard_captions: where wrong captions of the training samples come from; None: they get none.
        distorted_captions: how further captions of the training samples are made, for ``batch["texts"]``; None: they
            get none.
        max_bad_fraction: the run ends once a larger share of a set cannot be read. Until then another row stands in for
            a bad one in training, and evaluation leaves it out.
        decode: ``scaled`` decodes a JPEG for training at the smallest of its own scales (1/2, 1/4, 1/8) at which no
            view of the sample is enlarged, and lets torch resize other files. ``exact`` decodes every pixel and resizes
            as Pillow does, which takes longer. Evaluation is exact.
        num_texts: so many first captions of each sample are in ``batch["texts"]`` beside the drawn one in ``text``, for
            flows that tell kinds of captions apart; where a row has fewer, its last one stands in.
        min_max: bring each column of ``tables`` (blocks of numbers) to [0, 1] by its range in ``train``.

    Attributes:
        sources: set -> source, ``train`` first.
        tables: set -> block -> (N, F) float32, all sets alike; empty where there are no tables.
        bad: set -> row -> why it cannot be read, as far as this process knows.
        attributes: attribute -> class names of all sets; the position of a name is its label. Column a of ``label`` is
            the a-th attribute.
        mask_classes: mask -> class names, over all sets whose sources have masks.
        eval_names: names of the evaluation loaders in order, ``bank`` first; empty without ``eval``.

    Raises:
        ValueError: what can be known now, such as a batch larger than the training set.
    """

    def __init__(
        self,
        *,
        train: Source,
        eval: Mapping[str, Source] | None,  # noqa: A002 - the name of the config entry
        views: Mapping[str, View],
        batch_size: int,
        eval_batch_size: int,
        image_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        tokenizer: Tokenizer | None = None,
        num_workers: int = 0,
        bank_size: int | None = None,
        clusters: Clusters | None = None,
        lanes: int | None = None,
        window: int = 8,
        neighbours: str | None = None,
        hard_captions: HardCaptions | None = None,
        distorted_captions: DistortedCaptions | None = None,
        max_bad_fraction: float = 0.01,
        min_max: bool = False,
        decode: str = "scaled",
        num_texts: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.eval = train, dict(eval or {})
        self.sources = {"train": train, **self.eval}
        self.views = expand(views.values()) if views else []
        self.batch_size, self.eval_batch_size, self.image_size = batch_size, eval_batch_size, image_size
        self.seed, self.mean, self.std = seed, _channels("mean", mean, least=0.0), _channels("std", std, least=1e-6)
        self.tokenizer, self.num_workers = tokenizer, num_workers
        self.bank_size = len(train) if bank_size is None else min(bank_size, len(train))
        self.max_bad_fraction, self.decode, self.num_texts = max_bad_fraction, decode, num_texts
        self.bad = BadRows({name: len(source) for name, source in self.sources.items()}, max_bad_fraction)
        self.hard_captions, self.distorted_captions = hard_captions, distorted_captions
        self.neighbours = None if neighbours is None else Neighbours.of(neighbours, train)
        self.order = self._make_order(clusters, lanes, window)
        self._position = {"epoch": 0, "batch": 0}
        self._evaluated: dict[tuple[str, int], Tensor] = {}  # see `evaluated`
        self._check()
        self.tables = gather_tables(self.sources, min_max=min_max)
        self.eval_names = ["bank", *self.eval] if self.eval else []
        self.attributes = vocabulary(self.sources.values())
        self.mask_classes = mask_vocabulary(list(self.sources.values()))

    @property
    def meanings(self) -> dict[str, str]:
        """What the counts of unreadable samples mean, by the name that a run gives them."""
        retries = {"data/num_retries": "Requests to a store that failed and were made again; 0 is right."}
        return retries | {f"{name}/num_bad": "Samples that could not be read; 0 is right." for name in self.sources}

    def _make_order(self, clusters: Clusters | None, lanes: int | None, window: int) -> Order:
        """The order of an epoch that the options ask for."""
        asked = {"data.lanes": lanes, "data.clusters": clusters, "data.neighbours": self.neighbours}
        if len(given := [name for name, value in asked.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: set all but one of them to null")
        if self.neighbours is not None:
            return NeighbourOrder(self.neighbours, self.seed)
        if clusters is not None:
            clusters.check(self.train)
            return ClusterOrder(clusters, self.batch_size, self.seed)
        weights = row_weights_of(self.train)
        if lanes is None:
            return EpochOrder(parts_of(self.train), self.seed) if weights is None else WeightedOrder(weights, self.seed)
        if weights is not None:
            raise ValueError(
                f"data.lanes={lanes} shows the rows of a shard alike, but those of data.train have weights: set "
                "data.lanes=null, or data.train.weights=null"
            )
        if (blocks := blocks_of(self.train)) is None:
            raise ValueError(
                f"data.lanes={lanes}, but data.train ({type(self.train).__name__}) has no shards, or a source of it "
                "has none: set data.lanes=null, or choose data=shards"
            )
        return ShardOrder(parts_of(self.train), blocks, self.batch_size, self.seed, lanes=lanes, window=window)

    def _check(self) -> None:
        """Raise for what would otherwise be found later, in a worker."""
        EpochBatchSampler(self.order, self.batch_size)
        EvalBatchSampler(len(self.train), self.eval_batch_size)
        if taken := {"bank", "train"} & self.eval.keys():
            raise ValueError(f"data.eval: '{min(taken)}' is the name of the training set's rows; rename the set")
        for name in self.eval:
            if re.fullmatch(r"\.{0,2}|.*[/\\\x00-\x1f].*", str(name), re.DOTALL):
                raise ValueError(
                    f"data.eval: {name!r} cannot be the name of a file; rename the set, such as 'held_out'"
                )
        if self.bank_size < 1:
            raise ValueError(f"data.bank_size={self.bank_size}; set it to 1 or more, or null for all")
        if self.decode not in ("exact", "scaled"):
            raise ValueError(f"data.decode={self.decode!r}; set it to exact, or to scaled for speed on large JPEGs")
        if self.num_texts < 0 or (self.num_texts and self.tokenizer is None):
            raise ValueError(f"data.num_texts={self.num_texts}; set it to 0 or more captions, and a tokenizer with it")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={self.max_bad_fraction}; set it to a share from 0 to 1")
        for name, source in self.sources.items():
            if self.views and not has_pictures(source):
                what = f"data.{name if name == 'train' else f'eval.{name}'} ({type(source).__name__})"
                raise ValueError(f"{what} has no pictures: set views=none, or choose other data")
        if not self.views and not tables_of(self.train):
            raise ValueError("views is empty, and data.train has no tables: give at least one view (views=clip)")
        if self.tokenizer is not None and not has_captions(self.train):
            raise ValueError(
                "data.tokenizer is set but data.train offers no captions; "
                "set its `captions`, or data.tokenizer=null for images only"
            )
        if self.hard_captions is not None:
            if self.tokenizer is None:
                raise ValueError("hard_captions is set, and no captions are read: set a tokenizer, or it to none")
            self.hard_captions.check(self.train)
        if self.distorted_captions is not None:
            if self.tokenizer is None:
                raise ValueError("distorted_captions is set, and no captions are read: set a tokenizer, or it to none")
            if self.num_texts or self.hard_captions is not None:
                other = "data.num_texts=0" if self.num_texts else "hard_captions=none"
                raise ValueError(f"distorted_captions excludes what is set besides: set it to none, or {other}")

    def train_dataloader(self) -> DataLoader:
        """Training batches of this rank; starts where a loaded state says.

        Raises:
            ValueError: ``trainer.val_check_interval`` is longer than an epoch.
        """
        self._check_interval()
        epoch, start = self._position["epoch"], self._position["batch"]
        sampler = EpochBatchSampler(self.order, self.batch_size, **self._rank(), epoch=epoch, start=start)
        labels, tables = class_ids(self.train, self.attributes), list(self.tables["train"].values())
        replacement, max_bad = partial(self.order.replacement, batch_size=self.batch_size), self.bad.limit("train")
        coming = partial(rows_further_on, order=self.order, distance=max(1, self.num_workers) * self.batch_size)
        dataset = TrainDataset(
            self.train, self.views, labels, self.tokenizer, self.seed, replacement, max_bad, tables,
            scaled=self.decode == "scaled", coming=coming, num_texts=self.num_texts, hard_captions=self.hard_captions,
            distorted_captions=self.distorted_captions,
            mated=None if self.neighbours is None else self.neighbours.mated,
        )  # fmt: skip
        return self._loader(dataset, sampler, persistent_workers=self.num_workers > 0)

    def _check_interval(self) -> None:
        """Lightning counts the batches between two evaluations within an epoch, unless it is told not to."""
        interval: Any = getattr(self.trainer, "val_check_interval", None)
        if not isinstance(interval, int) or isinstance(interval, bool) or self.trainer is None or not self.eval_names:
            return
        num, limit = len(self.order) // self.batch_size, self.trainer.limit_train_batches
        num = min(num, limit) if isinstance(limit, int) else int(num * limit)
        if interval > num and self.trainer.check_val_every_n_epoch is not None:
            raise ValueError(
                f"trainer.val_check_interval={interval} is more than the {num} batches of an epoch: lower it, or set "
                "trainer.check_val_every_n_epoch=null, which counts on over epochs"
            )

    def predict_dataloader(self) -> DataLoader:
        """The whole training set with the evaluation transform, in order; this rank's share of each batch."""
        return self._eval_loader("train", torch.arange(len(self.train)))

    def val_dataloader(self) -> list[DataLoader]:
        """One loader a name of ``eval_names``; Lightning runs them one after the other."""
        return [self._eval_loader(_set_of(name), self.evaluated(name)[1]) for name in self.eval_names]

    def evaluated(self, name: str, at_most: int | None = None) -> tuple[Source, Tensor]:
        """The source of one of ``eval_names``, and those of its rows that are evaluated: (M,) int64, rising.

        A picture is evaluated once, with the labels of its first row.
        """
        source = self.sources[_set_of(name)]
        num = self.bank_size if name == "bank" else len(source)
        num = num if at_most is None else min(num, at_most)
        if (name, num) not in self._evaluated:
            self._evaluated[name, num] = first_rows(source, evenly_spread(len(source), num))
        return source, self._evaluated[name, num]

    def _eval_loader(self, name: str, rows: Tensor) -> DataLoader:
        source = self.sources[name]
        transform = partial(evaluation_view, size=self.image_size) if self.views else None
        labels, tables = class_ids(source, self.attributes), list(self.tables[name].values())
        tokenizer = self.tokenizer if has_captions(source) else None  # a labelled set need not have captions
        return self.in_order(EvalDataset(source, rows, transform, labels, tokenizer, tables))

    def in_order(self, dataset: Any) -> DataLoader:
        """Batches of a data set in its order; this rank's share of each."""
        sampler = EvalBatchSampler(len(dataset), self.eval_batch_size, **self._rank())
        # Workers that end with the round: several sets would otherwise keep theirs all through training.
        return self._loader(dataset, sampler, persistent_workers=False)

    def _loader(self, dataset: Dataset[Batch], sampler: Sampler, *, persistent_workers: bool) -> DataLoader:
        """A loader of ready batches. torch itself gives each worker one thread."""
        return Loader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=persistent_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator(),  # else each `iter` would draw from the generator that dropout uses
        )

    def _rank(self) -> dict[str, int]:
        trainer = self.trainer
        return {} if trainer is None else {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As Lightning's, but ``colour`` stays behind: the device half reads it without waiting for the device.

        Raises:
            ValueError: too many rows of a set are bad.
        """
        if "bad" in batch:
            of_train = "seed" in batch or (self.trainer is not None and self.trainer.predicting)
            name = "train" if of_train else self.eval_names[dataloader_idx]
            self.bad.note(_set_of(name), dict(batch["bad"]))
        others = {key: value for key, value in batch.items() if key not in ("colour", "bad")}
        moved = super().transfer_batch_to_device(others, device, dataloader_idx)
        return moved | {"colour": batch["colour"]} if "colour" in batch else moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Device half: uint8 views are coloured and normalised, uint8 images normalised; float ones are left alone.

        Raises:
            ValueError: the trainer's precision has cast boxes or colour to 16 bits.
        """
        if any(cast(dict, batch)[key].dtype.itemsize < 4 for key in ("boxes", "colour") if key in batch):
            raise ValueError("trainer.precision casts crop boxes to 16 bits; set it to bf16-mixed or 32-true")
        if "colour" in batch:
            batch["views"] = colour_views(batch["views"], batch["colour"], self.mean, self.std)
            batch["colour"] = batch["colour"].to(batch["index"].device, non_blocking=True)
        if "image" in batch and not batch["image"].is_floating_point():
            batch["image"] = normalise(batch["image"], self.mean, self.std)
        if "crops" in batch:
            batch["crops"] = [normalise(crop, self.mean, self.std) for crop in batch["crops"]]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The next batch, ``{"epoch": e, "batch": b}``, the options it depends on, and the rows found to be bad.

        It comes from the optimizer's steps, not from what workers have fetched ahead; micro-batches of a step that was
        not finished are run again.
        """
        if self.trainer is None:
            return {**self._position, "bad": dict(self.bad)}
        num_batches = max(1, int(min(len(self.order) // self.batch_size, self.trainer.num_training_batches)))
        epoch, batch = position(self.trainer.global_step, num_batches, self.trainer.accumulate_grad_batches)
        return {"epoch": epoch, "batch": batch, "made_with": self._made_with(), "bad": self.bad.gather()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for ``train_dataloader``; Lightning calls this before it builds loaders.

        Raises:
            ValueError: the position was counted in other batches than those of this run.
        """
        made_with, now = state_dict.get("made_with", {}), {} if self.trainer is None else self._made_with()
        if changed := [name for name in made_with.keys() & now.keys() if made_with[name] != now[name]]:
            told = "; ".join(f"{name} was {made_with[name]} and is {now[name]}" for name in sorted(changed))
            raise ValueError(
                f"cannot resume: {told}, so the checkpoint's place in the epoch means nothing. Set it back, or start "
                "a new run with init_from"
            )
        self._position = {"epoch": int(state_dict["epoch"]), "batch": int(state_dict["batch"])}
        self.bad.clear()
        self.bad.update({name: dict(rows) for name, rows in state_dict.get("bad", {}).items()})
        # Lightning cannot see that the sampler starts at the right batch.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    def _made_with(self) -> dict[str, Any]:
        """What a position in an epoch depends on."""
        assert self.trainer is not None
        return {
            "data.batch_size": self.batch_size,
            "seed": self.seed,
            "[samples, visits an epoch] of the training set's parts": [list(part) for part in self.order.parts],
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "trainer.limit_train_batches": self.trainer.limit_train_batches,
            **dict.fromkeys(("data.clusters", "data.lanes", "data.neighbours", "hash of data.train's weights")),
            **self.order.made_with,
        }


def _channels(name: str, values: Any, *, least: float) -> tuple[float, ...]:
    """Three finite numbers, all at least ``least``; raises ValueError."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(least <= number < math.inf for number in numbers):
        raise ValueError(f"data.{name}={values}; set it to three numbers, of pixels between 0 and 1")
    return numbers


def _set_of(eval_name: str) -> str:
    """The set whose rows are evaluated under a name of ``eval_names``."""
    return "train" if eval_name == "bank" else eval_name
