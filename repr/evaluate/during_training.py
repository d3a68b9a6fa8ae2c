"""Evaluation during training: one feature pass over every set feeds all metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from rich.table import Table
from torch import Tensor

from repr.batch import Batch
from repr.distributed import gather, rank, world_size
from repr.metrics.classes import Classes, load_classes
from repr.metrics.compositional import compositional
from repr.metrics.exhibits import Exhibits, NamedClasses
from repr.metrics.features import Features
from repr.metrics.zero_shot import average_templates, zero_shot

if TYPE_CHECKING:
    from repr.evaluate.dense import Dense

Metric = Callable[..., dict[str, float]]
CHANCE = ".chance"  # what metrics append to a name for its level at chance


class Evaluation(pl.Callback):
    """Compute every metric on every evaluation set from one pass of features.

    Sets whose sources are questions (:mod:`repr.data.questions.compositional`) are scored by
    :func:`repr.metrics.compositional.compositional`, where there is a text tower.
    Results are logged as ``<set>/<metric>``; where they are printed, the level at chance stands beside them.
    Each process embeds its share of every set; features are gathered, rows that only fill up the last batch
    are dropped by index, and the first process computes.

    Args:
        metrics: functions ``(bank, query) -> dict``, run once a set.
        pairs: likewise, on sets with captions.
        probes: functions ``(bank, query, attribute=...) -> dict``, run for every labelled attribute with two
            classes or more in the set, of which the bank has at least one; and once more for every other pooling of
            the trunk that the flow gives, as ``<pooling>_<metric>``.
        zero_shot: set -> class file, or several (:func:`repr.metrics.classes.load_classes`). Class embeddings are
            computed anew at each evaluation.
        dense: metrics of feature maps, from a pass of their own; None: no such pass.
        exhibits: what a person looks at, :func:`repr.metrics.exhibits.exhibits` with its options; None: nothing.
        headline: names of the numbers to print after each evaluation.

    Attributes:
        results: name -> (value, level at chance or None) of the last evaluation.
        shown: set -> exhibits of the last evaluation, on the first process.
        step: the optimizer step of the last evaluation; -1 before the first.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric] | None = None,
        pairs: Mapping[str, Metric] | None = None,
        probes: Mapping[str, Metric] | None = None,
        zero_shot: Mapping[str, str | Sequence[str] | Mapping[str, str]] | None = None,
        dense: Dense | None = None,
        exhibits: Callable[..., Exhibits] | None = None,
        headline: Sequence[str] = (),
    ) -> None:
        self.metrics = metrics or {}
        self.pairs = pairs or {}
        self.probes = probes or {}
        self.classes = {name: load_classes(files) for name, files in (zero_shot or {}).items()}
        self.dense, self.exhibits, self.headline = dense, exhibits, headline
        self.shown: dict[str, Exhibits] = {}
        self.results: dict[str, tuple[float, float | None]] = {}
        self.step = -1
        self._rows: dict[int, list[dict[str, Tensor]]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse class files that do not fit the data, and backbones without maps, before any training."""
        data = _data(trainer)
        if not hasattr(data, "eval_names"):
            raise ValueError("Evaluation needs a repr.data.datamodule.DataModule, which names the evaluation sets")
        if self.dense is not None:
            self.dense.check(data, pl_module)
        for name, several in self.classes.items():
            if name not in data.eval_names:
                known = ", ".join(data.eval_names[1:]) or "none"
                raise ValueError(f"eval.zero_shot names the set '{name}'; data.eval has {known}; set eval=default")
            if data.tokenizer is None:
                raise ValueError("eval.zero_shot needs data.tokenizer; set it, or set eval.zero_shot to null")
            for classes in several.values():
                classes.ids(data.attributes, f"eval.zero_shot.{name}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what an interrupted round has left."""
        self._rows = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the embeddings of a batch."""
        kept = {name: value.float() for name, value in outputs.items()}
        kept |= {f"batch.{name}": batch[name] for name in ("index", "text", "label") if name in batch}
        self._rows.setdefault(dataloader_idx, []).append(kept)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the features and compute all metrics."""
        data = _data(trainer)
        tables = {data.eval_names[i]: feature_table(rows, data.attributes) for i, rows in sorted(self._rows.items())}
        self._rows = {}
        if trainer.sanity_checking:
            return
        bank = tables.pop("bank")
        class_embeddings = {
            (name, kind): embed_classes(pl_module, classes)
            for name, several in self.classes.items()
            for kind, classes in several.items()
        }
        asked = {name: data.questions(name) for name in tables} if hasattr(pl_module, "encode_text") else {}
        captions = {name: embed_texts(pl_module, of.texts) for name, of in asked.items() if of is not None}
        maps = {} if self.dense is None else self.dense.tables(trainer, pl_module)
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            for name, query in tables.items():
                found = self._compute(bank, query)
                named: dict[str, NamedClasses] = {}
                for kind, classes in self.classes.get(name, {}).items():
                    ids = torch.tensor(classes.ids(data.attributes, name), device=query.image.device)
                    embeddings = class_embeddings[name, kind]
                    named[kind] = NamedClasses(classes.attribute, embeddings, ids, list(classes.names.values()))
                    found |= zero_shot(
                        bank,
                        query,
                        attribute=classes.attribute,
                        class_embeddings=embeddings,
                        class_labels=ids,
                        name=kind,
                    )
                if self.exhibits is not None:
                    self.shown[name] = self.exhibits(bank, query, attributes=data.attributes, classes=named)
                if name in captions:
                    of = asked[name]
                    found |= compositional(
                        bank,
                        query,
                        captions=captions[name],
                        candidates=of.candidates,
                        items=of.items,
                        attribute=of.split,
                        names=data.attributes[of.split],
                    )
                values |= {f"{name}/{key}": value for key, value in found.items()}
            values |= {} if self.dense is None else self.dense.compute(maps)
        values = trainer.strategy.broadcast(values)
        self.results = {k: (v, values.get(k + CHANCE)) for k, v in values.items() if not k.endswith(CHANCE)}
        self.step = trainer.global_step
        pl_module.log_dict({name: value for name, (value, _) in self.results.items()})
        if shown := [name for name in self.headline if name in self.results]:
            trainer.print(f"step {self.step}: " + "   ".join(f"{name} {_value(*self.results[name])}" for name in shown))

    def _compute(self, bank: Features, query: Features) -> dict[str, float]:
        values: dict[str, float] = {}
        pairs = {} if query.text is None else self.pairs
        for metric in (*pairs.values(), *self.metrics.values()):
            values |= metric(bank, query)
        for attribute, labels in query.labels.items():
            wanted = set(labels.tolist()) - {-1}
            if len(wanted) > 1 and wanted & set(bank.labels[attribute].tolist()):
                for probe in self.probes.values():
                    values |= probe(bank, query, attribute=attribute)
                    for name in query.poolings:
                        pooled = (replace(table, trunk=table.poolings[name]) for table in (bank, query))
                        values |= {f"{name}_{k}": v for k, v in probe(*pooled, attribute=attribute).items()}
        return values


def joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the batches of all ranks, in the order of the data set, each readable sample once."""
    columns = {name: gather(torch.cat([row[name] for row in rows])) for name in rows[0]}
    index, order = columns["batch.index"].sort(stable=True)
    first = index >= 0  # negative: could not be read
    first[1:] &= index[1:] != index[:-1]
    return {name: column[order[first]] for name, column in columns.items()}


def feature_table(rows: Sequence[Mapping[str, Tensor]], attributes: Mapping[str, Sequence[str]]) -> Features:
    """The table of a set from the batches of all ranks."""
    columns = joined(rows)
    tokens, labels = columns.get("batch.text"), columns.get("batch.label")
    return Features(
        index=columns["batch.index"],
        image=columns["image"],
        trunk=columns["trunk"],
        text=columns.get("text"),
        caption=None if tokens is None else tokens.unique(dim=0, return_inverse=True)[1],
        labels={} if labels is None else {name: labels[:, i] for i, name in enumerate(attributes)},
        poolings={k.removeprefix("trunk."): v for k, v in columns.items() if k.startswith("trunk.")},
        logits={k.removeprefix("logits."): v for k, v in columns.items() if k.startswith("logits.")},
    )


@torch.no_grad()
def embed_classes(module: Any, classes: Classes) -> Tensor:
    """One embedding a class, averaged over templates: (C, D)."""
    embeddings = embed_texts(module, classes.sentences())  # (C * T, D)
    return average_templates(embeddings.unflatten(0, (len(classes.names), len(classes.templates))))


@torch.no_grad()
def embed_texts(module: Any, texts: Sequence[str]) -> Tensor:
    """The embeddings of texts, (T, D) float32 on every rank.

    Each rank embeds its share, as many batches as the others, since a sharded text tower needs them all.
    """
    share = -(-len(texts) // world_size())
    own = list(texts[rank() * share : (rank() + 1) * share])
    own += list(texts[:1]) * (share - len(own))
    tokenizer = module.trainer.datamodule.tokenizer
    parts = (tokenizer(own[start : start + 1024]).to(module.device) for start in range(0, share, 1024))
    return gather(torch.cat([module.encode_text(part).float() for part in parts]))[: len(texts)]


def results_table(results: Mapping[str, tuple[float, float | None]]) -> Table:
    """A row a metric, and for each evaluation set the value beside its level at chance."""
    sets = list(dict.fromkeys(name.split("/", 1)[0] for name in results))
    metrics = list(dict.fromkeys(name.split("/", 1)[1] for name in results))
    table = Table(title="Evaluation", title_justify="left", header_style="bold")
    table.add_column("metric")
    for name in sets:
        table.add_column(name, justify="right")
        table.add_column("chance", justify="right", style="dim")
    for metric in metrics:
        cells = []
        for name in sets:
            value, chance = results.get(f"{name}/{metric}", (None, None))
            shown = "" if value is None else f"{value:.0f}" if metric.startswith("num_") else f"{value:.3f}"
            cells += [shown, "" if chance is None else f"{chance:.4f}"]
        table.add_row(metric, *cells)
    return table


def _data(trainer: Any) -> Any:
    """The DataModule, which Lightning's Trainer has without declaring it."""
    return trainer.datamodule


def _value(value: float, chance: float | None) -> str:
    return f"{value:.3f}" + ("" if chance is None else f" (chance {chance:.4f})")
