"""Evaluation during training: one pass over every set gathers the tables that all protocols read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from repr.batch import Batch
from repr.distributed import gather, rank, world_size
from repr.evaluate.encoder import Encoder
from repr.evaluate.protocol import compute, plan, read_protocols
from repr.evaluate.tables import Request, Tables, columns_of, embed
from repr.metrics.exhibits import Exhibits
from repr.metrics.features import Features
from repr.training.tensorboard import add_histograms


class GatheredTables(Tables):
    """The tables of an evaluation round, in the memory of every process.

    The Trainer has embedded pictures, with the first caption of each; :meth:`extract` embeds texts, maps and views.
    Each process embeds its share.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module = getattr(module, "main", module)  # of a hybrid the part that is evaluated
        encoder = Encoder.of_objective(module, data.image_size, data.mean, data.std, data.tokenizer)
        super().__init__(encoder, data, precision=str(trainer.precision))
        self._data = {name: name for name in data.eval_names}
        self._made: dict[str, dict[str, Tensor]] = {}

    def begin(self, pictures: Mapping[str, dict[str, Tensor]]) -> None:
        """Forget the tables of the last round, and take those of the pictures of this one: set -> columns."""
        self._made = {self._pictures(name): columns for name, columns in pictures.items()}
        for memory in (self._wanted, self._read, self._labels, self.classes, self.left_out):
            memory.clear()
        self.device = self.module.device

    def _want_captions(self, name: str) -> str | None:
        columns = self._made.get(self._pictures(name), ("text",))  # unknown before the first round
        return None if "text" in columns else f"{name} has no captions"

    def captioned(self, name: str) -> Features | None:
        """See :class:`repr.evaluate.tables.Tables`; here every row has a caption if one has."""
        table = self.pictures(name)
        return None if table.text is None else table

    def labels(self, name: str) -> dict[str, Tensor]:
        """The labels of the rows that were embedded; before the first round those of all rows."""
        if self._pictures(name) not in self._made:
            return super().labels(name)
        return {attribute: labels for attribute, labels in self.pictures(name).labels.items() if (labels >= 0).any()}

    @torch.no_grad()
    def extract(self) -> None:
        """Embed what was asked for beside the pictures."""
        for key, request in self._wanted.items():
            if key not in self._made:
                self._made[key] = self._embed_texts(request) if request.set is None else self._embed(request)

    def _columns(self, key: str) -> dict[str, Tensor]:
        return self._made[key]

    def _embed(self, request: Request) -> dict[str, Tensor]:
        """Embed some pictures of a set in one more pass, in as many batches as the Trainer takes of it."""
        trainer, rows = self.trainer, []
        number = self.data.eval_names.index(cast(str, request.set))
        for batch in islice(self.data.in_order(request.dataset()), int(trainer.num_val_batches[number])):
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
            for key in ("image", "crops", "views"):
                if key in batch:
                    batch[key] = trainer.precision_plugin.convert_input(batch[key])
            with trainer.precision_plugin.val_step_context():
                rows.append(embed(self.module, batch) | {"index": batch["index"]})
        return joined(rows)

    def _embed_texts(self, request: Request) -> dict[str, Tensor]:
        """Embed texts, on each process in as many batches as on the others, since a sharded tower needs them all."""
        texts, module, tokenizer = request.dataset().texts, cast(Any, self.module), cast(Any, self.encoder.tokenizer)
        share = -(-len(texts) // world_size())
        own = list(texts[rank() * share : (rank() + 1) * share])
        own += list(texts[:1]) * (share - len(own))
        parts = (tokenizer(own[i : i + 1024]).to(module.device) for i in range(0, share, 1024))
        embeddings = gather(torch.cat([module.encode_text(part).float() for part in parts]))
        return {"text": embeddings[: len(texts)]}


class Evaluation(pl.Callback):
    """Compute every protocol on every evaluation set.

    Each process embeds its share of every set, and the first one computes. What a set has no captions, labels or
    questions for is left out. Results are logged as ``<set>/<name>``.

    Args:
        headline: names of the numbers to print after each evaluation, beside their level at chance.
        protocols: key, such as ``knn`` -> config with ``_target_``, or a
            :class:`repr.evaluate.protocol.Protocol`; None: it is not computed.

    Attributes:
        results: name -> (value, level at chance or None) of the last evaluation.
        meanings: name -> what it means, of the last evaluation, on the first process.
        protocol_of: name -> key of the protocol that has computed it, likewise.
        shown: set -> exhibits of the last evaluation, on the first process.
        step: the optimizer step of the last evaluation; -1 before the first.

    Raises:
        ConfigError: one of ``protocols`` is no protocol.
    """

    tables: GatheredTables

    def __init__(self, headline: Sequence[str] = (), **protocols: Any) -> None:
        self.protocols, self.headline = read_protocols(protocols), headline
        self.shown: dict[str, Exhibits] = {}
        self.results: dict[str, tuple[float, float | None]] = {}
        self.meanings: dict[str, str] = {}
        self.protocol_of: dict[str, str] = {}
        self.step = -1
        self._rows: dict[int, list[dict[str, Tensor]]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a protocol that cannot be computed of the data or the encoder before any training.

        Raises:
            ValueError: there is one.
        """
        if not hasattr(trainer.datamodule, "eval_names"):  # type: ignore[attr-defined]
            raise ValueError("Evaluation needs a repr.data.datamodule.DataModule, which names the evaluation sets")
        self.tables = GatheredTables(trainer, pl_module)
        for key, protocol in self.protocols.items():
            if stage == "fit" and (fault := protocol.fault(self.tables)):
                raise ValueError(f"eval.{key} {fault}, or eval.{key}=null")
        plan(self.protocols, self.tables)

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
        of_batch = {"index": batch["index"], "tokens": batch.get("text"), "label": batch.get("label")}
        kept = columns_of(outputs) | {name: values for name, values in of_batch.items() if values is not None}
        self._rows.setdefault(dataloader_idx, []).append(kept)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the tables and compute all protocols."""
        rows, self._rows = self._rows, {}
        if trainer.sanity_checking:
            return
        tables = self.tables
        pictures = {tables.data.eval_names[i]: joined(batches) for i, batches in sorted(rows.items())}
        tables.begin(pictures)
        asked = plan(self.protocols, tables)
        tables.extract()
        for protocol in self.protocols.values():
            protocol.prepare(tables)
        numbers, self.shown = compute(asked, tables) if trainer.is_global_zero else ({}, {})
        for name in pictures if trainer.is_global_zero else ():
            if name != "bank":
                of = tables.pictures(name)
                add_histograms(trainer, name, {"image": of.image, "trunk": of.trunk, "text": of.text})
        tables.begin({})  # gives their memory back
        self.meanings = {name: number.meaning for name, number in numbers.items()}
        self.protocol_of = {name: number.protocol.get("eval", "") for name, number in numbers.items()}
        values = {name: (number.value, number.chance) for name, number in numbers.items()}
        self.results = trainer.strategy.broadcast(values)
        self.step = trainer.global_step
        pl_module.log_dict({name: value for name, (value, _) in self.results.items()})
        if shown := [name for name in self.headline if name in self.results]:
            trainer.print(f"step {self.step}: " + "   ".join(f"{name} {_value(*self.results[name])}" for name in shown))


def joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the batches of all processes, in the order of the data set, each readable sample once."""
    columns = {name: gather(torch.cat([row[name] for row in rows])) for name in rows[0]}
    index, order = columns["index"].sort(stable=True)
    first = index >= 0  # negative: could not be read
    first[1:] &= index[1:] != index[:-1]
    return {name: column[order[first]] for name, column in columns.items()}


def _value(value: float, chance: float | None) -> str:
    return f"{value:.3f}" + ("" if chance is None else f" (chance {chance:.4f})")
