"""The DataModule: sources and views -> batches, the same ones for every number of workers and ranks."""

from __future__ import annotations

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
from repr.data.datasets import Tokenizer, TrainDataset, class_ids, vocabulary
from repr.data.epoch_order import EpochOrder, Order
from repr.data.eval_datasets import EvalDataset
from repr.data.samplers import EpochBatchSampler, EvalBatchSampler, position
from repr.data.sources.numeric_tables import gather_tables
from repr.data.sources.source import (
    Source,
    has_captions,
    has_pictures,
    mask_vocabulary,
    parts_of,
    tables_of,
)
from repr.data.views import View, expand
from repr.data.workers import Loader


class DataModule(LightningDataModule):
    """Training batches of augmented views, and evaluation batches of every named data set.

    Batch sizes are those of all ranks together. Evaluation runs over ``bank`` (rows of the training
    set, for nearest neighbours and probes) and then the sets of ``eval``, in the order of
    ``eval_names``. Use it with ``Trainer(use_distributed_sampler=False)``.

    Args:
        train: the training set.
        eval: name -> evaluation set.
        views: name -> view, large ones first; none: no pictures are read.
        batch_size: training samples a step, all ranks together.
        eval_batch_size: likewise for evaluation.
        image_size: side of evaluation images in pixels.
        seed: everything random is a function of it, the epoch and the row.
        mean: of the three channels, pixels in [0, 1].
        std: likewise.
        tokenizer: list of B texts -> (B, L) int64; None for images only.
        num_workers: worker processes a rank and loader.
        bank_size: at most this many rows of the training set are the bank, evenly spread; None takes all.
        clusters: of the training set: each batch holds rows of one of them; None: of all.
        max_bad_fraction: of each set; the run ends once more of its rows cannot be read. Until then another row stands
            in for a bad one in training, and evaluation leaves it out.
        min_max: of sources with ``tables`` (blocks of numbers): bring each column to [0, 1] by its range in ``train``.

    Attributes:
        tables: set, ``train`` included -> block -> (N, F) float32, all sets alike; empty where there are no tables.
        bad: set -> row -> why it cannot be read, as far as this process knows.
        attributes: attribute -> class names; the position of a name is its label, in one vocabulary
            over all sets. Column a of ``label`` is the a-th attribute.
        mask_classes: mask -> class names, over all sets whose sources have masks.
        eval_names: names of the evaluation loaders in order, ``bank`` first; empty without ``eval``.

    Raises:
        ValueError: what can be known now, such as a batch larger than the training set.
    """

    def __init__(
        self,
        *,
        train: Source,
        eval: Mapping[str, Source],  # noqa: A002 - the name of the config entry
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
        max_bad_fraction: float = 0.01,
        min_max: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.eval, self.views = train, dict(eval), expand(views.values()) if views else []
        self.batch_size, self.eval_batch_size, self.image_size = batch_size, eval_batch_size, image_size
        self.seed, self.mean, self.std = seed, tuple(mean), tuple(std)
        self.tokenizer, self.num_workers = tokenizer, num_workers
        self.bank_size = len(train) if bank_size is None else min(bank_size, len(train))
        self.max_bad_fraction = max_bad_fraction
        self.bad = BadRows({name: len(source) for name, source in {"train": train, **eval}.items()}, max_bad_fraction)
        self.order: Order
        if clusters is None:
            self.order = EpochOrder(parts_of(train), seed)
        else:
            clusters.check(train)
            self.order = ClusterOrder(clusters, batch_size, seed)
        self._position = {"epoch": 0, "batch": 0}
        self._check()
        self.tables = gather_tables({"train": train, **self.eval}, min_max=min_max)
        self.eval_names = ["bank", *self.eval] if self.eval else []
        self.attributes = vocabulary([train, *self.eval.values()])
        self.mask_classes = mask_vocabulary([train, *self.eval.values()])

    def _check(self) -> None:
        """Raise for what would otherwise be found later, in a worker."""
        EpochBatchSampler(self.order, self.batch_size)
        EvalBatchSampler(len(self.train), self.eval_batch_size)
        if taken := {"bank", "train"} & self.eval.keys():
            raise ValueError(f"data.eval: '{min(taken)}' is the name of the training set's rows; rename the set")
        if self.bank_size < 1:
            raise ValueError(f"data.bank_size={self.bank_size}; set it to 1 or more, or null for all")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={self.max_bad_fraction}; set it to a share from 0 to 1")
        for name, source in ({"train": self.train, **self.eval} if self.views else {}).items():
            if not has_pictures(source):
                what = f"data.{name if name == 'train' else f'eval.{name}'} ({type(source).__name__})"
                raise ValueError(f"{what} has no pictures: set views=none, or choose other data")
        if not self.views and not tables_of(self.train):
            raise ValueError("views is empty, and data.train has no tables: give at least one view (views=clip)")
        if self.tokenizer is not None and not has_captions(self.train):
            raise ValueError(
                "data.tokenizer is set but data.train offers no captions; "
                "set its `captions`, or data.tokenizer=null for images only"
            )

    def train_dataloader(self) -> DataLoader:
        """Training batches of this rank; starts where a loaded state says."""
        rank, world_size = self._rank()
        at = {"epoch": self._position["epoch"], "start": self._position["batch"]}
        sampler = EpochBatchSampler(self.order, self.batch_size, rank=rank, world_size=world_size, **at)
        dataset = TrainDataset(
            self.train,
            self.views,
            class_ids(self.train, self.attributes),
            self.tokenizer,
            self.seed,
            replacement=partial(self.order.replacement, batch_size=self.batch_size),
            max_bad=self.bad.limit("train"),
            tables=list(self.tables["train"].values()),
        )
        return self._loader(dataset, sampler, persistent_workers=self.num_workers > 0)

    def predict_dataloader(self) -> DataLoader:
        """The whole training set with the evaluation transform, in order; this rank's share of each batch."""
        return self._eval_loader(self.train, torch.arange(len(self.train)), "train")

    def val_dataloader(self) -> list[DataLoader]:
        """One loader a name of ``eval_names``; Lightning runs them one after the other."""
        return [self._eval_loader(*self.evaluated(name), name) for name in self.eval_names]

    def evaluated(self, name: str, at_most: int | None = None) -> tuple[Source, Tensor]:
        """The source of one of ``eval_names``, and the rows of it that are evaluated: (M,) int64, rising.

        Args:
            name: of the set.
            at_most: so many of its rows, evenly spread; None: all.
        """
        source = self._source(name)
        num = self.bank_size if name == "bank" else len(source)
        return source, evenly_spread(len(source), num if at_most is None else min(num, at_most))

    def _source(self, name: str) -> Source:
        return self.train if name in ("train", "bank") else self.eval[name]

    def _eval_loader(self, source: Source, rows: Tensor, name: str) -> DataLoader:
        size, tables = self.image_size if self.views else None, self.tables["train" if name == "bank" else name]
        tokenizer = self.tokenizer if has_captions(source) else None  # a labelled set need not have captions
        labels = class_ids(source, self.attributes)
        return self.in_order(EvalDataset(source, rows, size, labels, tokenizer, tables=list(tables.values())))

    def in_order(self, dataset: Any) -> DataLoader:
        """Batches of a data set in its order; this rank's share of each."""
        rank, world_size = self._rank()
        sampler = EvalBatchSampler(len(dataset), self.eval_batch_size, rank=rank, world_size=world_size)
        # Workers that end with the round: several sets would otherwise keep theirs all through training.
        return self._loader(dataset, sampler, persistent_workers=False)

    def _loader(self, dataset: Dataset[Batch], sampler: Sampler, *, persistent_workers: bool) -> DataLoader:
        """A loader of ready batches. torch itself gives each worker one thread."""
        return Loader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            persistent_workers=persistent_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator(),  # else each `iter` would draw from the generator that dropout uses
        )

    def _rank(self) -> tuple[int, int]:
        """Rank and world size, 0 and 1 without a trainer."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As Lightning's, but ``colour`` stays behind: the device half reads it without waiting for the device.

        Raises:
            ValueError: with the rows of this batch, too many of a set are bad.
        """
        if "bad" in batch:
            of_train = "seed" in batch or (self.trainer is not None and self.trainer.predicting)
            name = "train" if of_train else self.eval_names[dataloader_idx]
            self.bad.note("train" if name == "bank" else name, dict(batch["bad"]))
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

    def gather_bad(self) -> dict[str, dict[int, str]]:
        """``bad`` of all ranks, which this makes the same; every rank must call it.

        Raises:
            ValueError: too many rows of a set are bad.
        """
        self.bad.gather()
        return dict(self.bad)

    def state_dict(self) -> dict[str, Any]:
        """The next batch, ``{"epoch": e, "batch": b}``, the options it depends on, and the rows found to be bad.

        It comes from the optimizer's steps, not from what workers have fetched ahead; micro-batches
        of a step that was not finished are run again.
        """
        if self.trainer is None:
            return {**self._position, "bad": dict(self.bad)}
        num_batches = max(1, int(min(len(self.order) // self.batch_size, self.trainer.num_training_batches)))
        epoch, batch = position(self.trainer.global_step, num_batches, self.trainer.accumulate_grad_batches)
        return {"epoch": epoch, "batch": batch, "made_with": self._made_with(), "bad": self.gather_bad()}

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
            "data.clusters": self.order.made_with,
        }


def _as_it_is(batch: Any) -> Any:
    """Collate: the data set gives whole batches."""
    return batch
