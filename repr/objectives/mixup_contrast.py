"""Classification from several modalities, with a contrast of mixed samples: M3CoL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, Embeddings, StepOutput
from repr.distributed import gather, means, rank, world_size
from repr.losses import mixup
from repr.losses.chance import at_chance
from repr.losses.exchange import GATHER
from repr.losses.precision import precision_of
from repr.models.backbone import width_of
from repr.models.batchnorm import synchronise
from repr.models.heads import plain_mlp
from repr.objectives.base import Objective
from repr.objectives.labels import learnt_column
from repr.objectives.loss_choice import chosen
from repr.objectives.mixing import Mixing
from repr.objectives.towers import text_faults
from repr.optim import Optim


class MixupContrast(Objective):
    """An encoder and a head for each modality, a head for all of them, and a contrast between the modalities.

    Method: M3CoL (arXiv 2409.17777). Its ablations are weights of 0 and, for CLIP's term, draws that mix nothing.

    Flow: each modality -> its encoder -> its head; all embeddings side by side -> fusion head. The terms are those of
    the global batch, in float32. For the contrast each modality is mixed within itself and compared with the next one,
    unmixed; the last one with the first, so two modalities are compared in both directions. After the switch embeddings
    are compared as they are. Who is mixed with whom comes from the seeds of the global batch; partners are taken from
    what is gathered of all ranks, embeddings or, at the input level, raw inputs (without gradient). There an encoder
    passes its rows and the mixed ones together. BatchNorm of the backbone has the statistics of all ranks.

    Terms: ``fusion`` and ``<modality>_head``, cross-entropies; ``contrast``, the sum over the pairs of modalities.
    Modalities are ``image``, ``text`` and the names of ``tables``, in this order.

    Args:
        backbone: image encoder with ``num_features``, (B, 3, H, W) -> (B, D); None: no image.
        text: text encoder with ``output_dim``, (B, L) -> (B, D); None: no text.
        tables: name -> encoder of a block of numbers, (B, F) -> (B, D), in the order of the data's blocks.
        num_classes: C, all that the data has.
        attribute: which labels are learnt; None: the first.
        head_widths: of the hidden layers of each head.
        mixing: which samples are mixed and how modalities are compared; None: as in the paper.
        weights: weight of each term; the default is the paper's.
    """

    TERMS = ("fusion", "image_head", "text_head", "contrast")
    PAIRWISE = ("contrast",)
    ENCODERS = ("backbone", "text")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "contrast": "Cross-entropy of finding the parts of a mixed sample in the other modality; lower is better.",
        "mixed": "1 while samples are mixed, 0 after the switch.",
    }

    def __init__(
        self,
        backbone: nn.Module | None = None,
        text: nn.Module | None = None,
        tables: Mapping[str, nn.Module] | None = None,
        *,
        num_classes: int,
        attribute: str | None = None,
        head_widths: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        mixing: Mixing | None = None,
        chunk_size: int | None = None,
        loss_precision: str = "float32",
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        tables = dict(tables or {})
        if taken := tables.keys() & {"image", "text", "fusion"}:
            raise ValueError(f"tables: '{min(taken)}' is a name of another part; rename the block")
        widths: dict[str, int] = {}
        if backbone is not None:
            widths["image"], backbone = width_of(backbone), synchronise(backbone)
        if text is not None:
            widths["text"] = width_of(text, "output_dim")
        widths |= {name: _widths(name, encoder)[1] for name, encoder in tables.items()}
        if weights is None:
            weights = {"fusion": 1.0} | {f"{name}_head": 1.0 for name in widths} | {"contrast": 0.1}
        super().__init__(backbone, weights=weights, optim=optim, options={"tables": tables})
        self.text = text
        self.tables = nn.ModuleDict(tables)
        self.modalities = tuple(widths)
        self.mixing = mixing or Mixing()
        self._check(widths)
        inputs = {f"{name}_head": width for name, width in widths.items()} | {"fusion": sum(widths.values())}
        shapes = {name: [width, *head_widths, num_classes] for name, width in inputs.items() if name in self.weights}
        self.heads = nn.ModuleDict({name: plain_mlp(shape, dropout=dropout) for name, shape in shapes.items()})
        self.num_classes, self.attribute = num_classes, attribute
        losses = {"mixed": self.mixing.mixed_loss, "clean": self.mixing.clean_loss}
        options: Any = {"chunk_size": chunk_size, "exchange": GATHER, "precision": precision_of(loss_precision)}
        self.losses = chosen(losses, pairwise=("mixed", "clean"), **options)
        self._column = 0  # of `label`

    @classmethod
    def term_names(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """``TERMS``, and a head for each table."""
        return (*cls.TERMS, *(f"{name}_head" for name in options.get("tables") or {}))

    @property
    def meanings(self) -> dict[str, str]:
        """Those of the heads, too."""
        told = super().meanings
        for name in self.heads:
            told[f"train/{name}"] = f"Cross-entropy of the classes by the head {name}; lower is better."
            told[f"train/{name}_accuracy"] = f"Share of a batch whose class the head {name} names; higher is better."
        return told

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Pictures or texts that are not read or not used."""
        yield from super().config_faults(cfg)
        for part, needed in (("backbone", "views"), ("text", "tokenizer")):
            if getattr(self, part) is not None and not cfg.get(needed):
                yield f"objective.{part} has nothing to encode: set {needed}, or objective.{part}=null"
        if self.text is not None and cfg.get("tokenizer"):
            yield from text_faults(type(self).__name__, self.text, cfg)

    def negatives_fault(self) -> str | None:
        """Batches of one cluster would have few of the classes that are learnt."""
        return "it learns classes, of which a batch of one cluster has few"

    def _check(self, widths: Mapping[str, int]) -> None:
        if not widths:
            raise ValueError("MixupContrast has no modality: give backbone, text or tables")
        told = ", ".join(f"{name} {width}" for name, width in widths.items())
        if "contrast" in self.weights and (len(widths) < 2 or len(set(widths.values())) > 1):
            raise ValueError(
                f"the contrast compares two modalities or more, of equal widths, and there are: {told}. Set embed_dim "
                "to the width of the backbone, the tables' last widths likewise, or weights.contrast=0"
            )
        heads = {f"{name}_head" for name in widths}
        if absent := sorted(self.weights.keys() - heads - {"fusion", "contrast"}):
            raise ValueError(f"weights.{absent[0]}: there is no such modality, only {told}; set it to 0")
        if not self.weights.keys() & {"fusion", "contrast"} and (idle := [f for f in heads if f not in self.weights]):
            part = min(idle).removesuffix("_head")
            raise ValueError(f"no weighted term learns from {part}: leave it out, or give {min(idle)} a weight")
        if unknown := sorted(self.mixing.levels.keys() - widths.keys()):
            raise ValueError(f"mixing.levels.{unknown[0]}; the modalities are {', '.join(widths)}")

    def setup(self, stage: str) -> None:
        """Find the labels in the data, if it comes from a DataModule, and see that they and the tables fit.

        Raises:
            ValueError: the data has no such attribute, more classes, rows without a label, or other tables.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "attributes"):
            return
        if self.tables:
            self._check_tables({block: table.shape[1] for block, table in data.tables["train"].items()})
        self._column = learnt_column(data, type(self).__name__, self.attribute, self.num_classes)

    def _check_tables(self, blocks: Mapping[str, int]) -> None:
        """Compare the encoders of tables with the blocks of the data and their numbers of columns."""
        ours = {name: _widths(name, encoder)[0] for name, encoder in self.tables.items()}
        if list(ours.items()) != list(blocks.items()):
            told = [", ".join(f"{name} ({num})" for name, num in part.items()) or "none" for part in (ours, blocks)]
            raise ValueError(
                f"objective.tables encode {told[0]}, and the data has the blocks {told[1]}: name the same blocks in "
                "the same order, and set the first of objective.tables.<name>.widths to the number of columns"
            )

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return cast(nn.Module, self.text)(tokens)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of an evaluation batch, and the logits of every head whose modalities the set has.

        ``image`` and ``trunk`` are the embedding of the picture, or, in a flow without pictures, all embeddings side
        by side; ``text`` is that of the caption.
        """
        encoded = {name: self._encode(name, rows) for name, rows in self._rows(batch, batch.get("image")).items()}
        image = encoded["image"] if "image" in encoded else torch.cat(list(encoded.values()), dim=1)
        return Embeddings(image=image, trunk=image, text=encoded.get("text"), logits=self._logits(encoded))

    def step(self, batch: Batch) -> StepOutput:
        """Terms of the global batch."""
        rows = self._rows(batch, next(iter(batch.get("views", [])), None))
        if lacking := [*(name for name in self.modalities if name not in rows), *({"label"} - batch.keys())]:
            raise ValueError(
                f"{type(self).__name__} needs {', '.join(self.modalities)} and labels, and the batch lacks "
                f"{', '.join(lacking)}: choose data that has them, set tokenizer for text, or leave the modality out"
            )
        label = batch["label"] if batch["label"].ndim == 1 else batch["label"][:, self._column]
        if label.device.type == "cpu" and (missing := gather(label) < 0).any():  # elsewhere it would have to wait
            raise ValueError(f"{int(missing.sum())} rows of a batch have no label: leave them out of the data")
        draws: dict[str, tuple[Tensor, Tensor]] = {}
        if "contrast" in self.weights and self._mixes_now():
            seed = gather(batch["seed"])
            draws = {name: self.mixing.draw(seed, stream=number) for number, name in enumerate(self.modalities)}
        own: dict[str, Tensor] = {}
        mixed: dict[str, Tensor] = {}
        for name, x in rows.items():
            if name in draws and self.mixing.levels.get(name) == "input":
                own[name], mixed[name] = self._encode(name, torch.cat([x, _mixed(x, *draws[name])])).chunk(2)
            else:
                own[name] = self._encode(name, x)
        logits = {name: value.float() for name, value in self._logits(own).items()}
        terms = {name: F.cross_entropy(value, label) for name, value in logits.items()}
        right = {f"{name}_accuracy": (value.argmax(1) == label).float().mean() for name, value in logits.items()}
        values = means(terms | right)
        own = {name: value.float() for name, value in own.items()}  # (B, D) each
        if "contrast" in self.weights:
            mixed = {
                name: mixed[name].float() if name in mixed else _mixed(own[name], *draw) for name, draw in draws.items()
            }
            values["contrast"] = self._contrast(own, mixed, draws)
        logs = {name: values[name].detach() for name in right} | {"mixed": float(bool(draws))}
        return StepOutput({name: values[name] for name in self.weights}, own, logs=logs)

    def _contrast(
        self, own: dict[str, Tensor], mixed: dict[str, Tensor], draws: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Each modality with the next one, summed."""
        names = list(own)
        if len(own[names[0]]) * world_size() < 2:
            raise ValueError(
                f"{type(self).__name__} contrasts the samples of a batch, and this one has one: give it two or more"
            )
        values = []
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            if mixed:
                perm, lam = draws[name]
                partner = (mixed if self.mixing.mix_other else own)[other]
                values.append(self.losses["mixed"](mixed[name], partner, perm=perm, lam=lam))
            else:
                values.append(self.losses["clean"](own[name], own[other]))
        return torch.stack(values).sum()

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of a cross-entropy ln C; of the contrast that of each pair of modalities, summed."""
        pair = at_chance(self.losses["mixed" if self._mixes_now() else "clean"], num_rows=num_rows)
        contrast = {"contrast": None if pair is None else len(self.modalities) * pair}
        return dict.fromkeys(self.heads, math.log(self.num_classes)) | contrast

    def _mixes_now(self) -> bool:
        """Whether samples are mixed; a function of the number of the step alone."""
        if self.total_steps is None:
            return self.mixing.switch > 0
        epochs = 0 if self._trainer is None else max(self.trainer.max_epochs or 0, 0)
        num_parts = epochs or self.total_steps  # steps where there are no epochs
        return self.step_number * num_parts < int(self.mixing.switch * num_parts) * self.total_steps

    def _rows(self, batch: Batch, pictures: Tensor | None) -> dict[str, Tensor]:
        """The rows of each modality that a batch has."""
        tables: Any = batch.get("tables", [None] * len(self.tables)) if self.tables else []
        rows = {"image": pictures, "text": batch.get("text"), **dict(zip(self.tables, tables, strict=True))}
        return {name: x for name in self.modalities if (x := rows[name]) is not None}

    def _encode(self, modality: str, rows: Tensor) -> Tensor:
        encode = {"image": self.encode_image, "text": self.encode_text}.get(modality) or self.tables[modality]
        return encode(rows)

    def _logits(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the heads whose modalities are there."""
        inputs = {f"{name}_head": value for name, value in encoded.items()}
        if len(encoded) == len(self.modalities):
            inputs["fusion"] = torch.cat(list(encoded.values()), dim=1)
        return {name: head(inputs[name]) for name, head in self.heads.items() if name in inputs}


def _mixed(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """This rank's rows, mixed with partners on any rank."""
    perm, lam = (all_of_them.chunk(world_size())[rank()] for all_of_them in (perm, lam))
    return mixup.mix(x, gather(x)[perm], lam=lam)


def _widths(name: str, encoder: nn.Module) -> tuple[int, int]:
    """How wide the first linear layer of a table's encoder takes its input, and how wide the last gives its output."""
    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"tables.{name} has no linear layer; set it to one such as repr.models.heads.plain_mlp")
    return layers[0].in_features, layers[-1].out_features
