"""Classification from several modalities, with a contrast of mixed samples: M3CoL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, Embeddings, StepOutput
from repr.distributed import gather, rank
from repr.losses import mixup
from repr.losses.chance import at_chance
from repr.models.backbone import width_of
from repr.models.batchnorm import synchronise
from repr.models.heads import plain_mlp
from repr.objectives.base import Objective, in_chunks
from repr.optim import Optim

Loss = Callable[..., Tensor]
Draw = Callable[..., tuple[Tensor, Tensor]]
LEVELS = ("embedding", "input")
DRAW: Draw = partial(mixup.draw_mix, beta=0.15, fraction=0.5)
MIXED: Loss = partial(mixup.mixed_contrast, temperature=0.1)
CLEAN: Loss = partial(mixup.soft_clip, temperature=0.125)


class MixupContrast(Objective):
    """An encoder and a head for each modality, a head for all of them, and a contrast between the modalities.

    Method: M3CoL (arXiv 2409.17777). Its ablations are weights of 0 and, for CLIP's term, draws that mix nothing.

    Flow: each modality -> its encoder -> its head; all embeddings side by side -> fusion head. Logits and embeddings
    are gathered, and the terms are those of the global batch, in float32. For the contrast each modality is mixed
    within itself and compared with the next one, unmixed; the last one with the first, so two modalities are compared
    in both directions. From ``switch`` of the epochs on, embeddings are compared as they are, by ``clean_loss``. Who is
    mixed with whom comes from the seeds of the global batch. At the embedding level mixing follows the gathering; at
    the input level the raw inputs of all ranks are gathered (without gradient), and an encoder passes its rows and the
    mixed ones together. BatchNorm of the backbone has the statistics of all ranks.

    Terms: ``fusion`` and ``<modality>_head``, cross-entropies; ``contrast``, the sum over the pairs of modalities.
    Modalities are ``image``, ``text`` and the names of ``tables``, in this order.

    Args:
        backbone: image encoder with ``num_features``, (B, 3, H, W) -> (B, D); None: no image.
        text: text encoder with ``output_dim``, (B, L) -> (B, D); None: no text.
        tables: name -> encoder of a block of numbers, (B, F) -> (B, D), in the order of the data's blocks.
        num_classes: C, all that the data has.
        attribute: which labels are learnt; None: the first.
        head_widths: of the hidden layers of each head.
        dropout: in the heads.
        mixing: modality -> where it is mixed: ``embedding``, which those have that are not named, or ``input``.
        switch: share of ``trainer.max_epochs``, rounded down to whole epochs, with the mixed contrast. Of a run that
            is limited by ``trainer.max_steps`` alone, share of its steps.
        draw: ``(seed, stream=...) -> (perm, lam)``; the stream is the number of the modality.
        mixed_loss: ``(mixed, other, perm=..., lam=...)`` before the switch.
        clean_loss: ``(a, b)`` after it.
        mix_other: the other modality is mixed too, as it is in the authors' code by a slip. To reproduce its numbers.
        chunk_size: rows of the matrix of pairs that exist at a time; None: all.
        weights: weight of each term; the default is the paper's.
        optim: optimizer and schedule.
    """

    TERMS = ("fusion", "image_head", "text_head", "contrast")
    PAIRWISE = ("contrast",)
    ENCODERS = ("backbone", "text")

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
        mixing: Mapping[str, str] | None = None,
        switch: float = 0.33,
        draw: Draw = DRAW,
        mixed_loss: Loss = MIXED,
        clean_loss: Loss = CLEAN,
        mix_other: bool = False,
        chunk_size: int | None = None,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        tables = dict(tables or {})
        if taken := tables.keys() & {"image", "text", "fusion"}:
            raise ValueError(f"objective.tables: '{min(taken)}' is a name of another part; rename the block")
        widths: dict[str, int] = {}
        if backbone is not None:
            widths["image"], backbone = width_of(backbone), synchronise(backbone)
        if text is not None:
            widths["text"] = width_of(text, "output_dim")
        widths |= {name: _out_features(name, encoder) for name, encoder in tables.items()}
        if weights is None:
            weights = {"fusion": 1.0} | {f"{name}_head": 1.0 for name in widths} | {"contrast": 0.1}
        super().__init__(backbone, weights=weights, optim=optim, options={"tables": tables})
        self.text = text
        self.tables = nn.ModuleDict(tables)
        self.modalities = tuple(widths)
        self.mixing = dict.fromkeys(widths, LEVELS[0]) | dict(mixing or {})
        self._check(widths, switch)
        shapes = {f"{name}_head": width for name, width in widths.items()} | {"fusion": sum(widths.values())}
        self.heads = nn.ModuleDict(
            {
                name: plain_mlp([width, *head_widths, num_classes], dropout=dropout)
                for name, width in shapes.items()
                if name in self.weights
            }
        )
        self.num_classes, self.attribute, self.switch = num_classes, attribute, switch
        self.draw, self.mix_other = draw, mix_other
        losses = {"mixed": mixed_loss, "clean": clean_loss}
        self.losses = in_chunks(losses, list(losses), chunk_size)
        self._column = 0  # of `label`

    @classmethod
    def term_names(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """``TERMS``, and a head for each table."""
        return (*cls.TERMS, *(f"{name}_head" for name in options.get("tables") or {}))

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """A batch of one, and pictures or texts that are not read or not used."""
        if "contrast" in self.weights and cfg.data.batch_size < 2:
            yield f"{type(self).__name__} contrasts the samples of a batch: set data.batch_size to 2 or more"
        for part, needed in (("backbone", "views"), ("text", "tokenizer")):
            if getattr(self, part) is not None and not cfg.get(needed):
                yield f"objective.{part} has nothing to encode: set {needed}, or objective.{part}=null"

    def negatives_fault(self) -> str | None:
        """Batches of one cluster would have few of the classes that are learnt."""
        return "it learns classes, of which a batch of one cluster has few"

    def _check(self, widths: Mapping[str, int], switch: float) -> None:
        if not widths:
            raise ValueError("MixupContrast has no modality: give backbone, text or tables")
        told = ", ".join(f"{name} {width}" for name, width in widths.items())
        if "contrast" in self.weights and (len(widths) < 2 or len(set(widths.values())) > 1):
            raise ValueError(
                f"the contrast compares two modalities or more, of equal widths, and there are: {told}. Set embed_dim "
                "to the width of the backbone, the tables' last widths likewise, or objective.weights.contrast=0"
            )
        heads = {f"{name}_head" for name in widths}
        if absent := sorted(self.weights.keys() - heads - {"fusion", "contrast"}):
            raise ValueError(f"objective.weights.{absent[0]}: there is no such modality, only {told}; set it to 0")
        for name, level in self.mixing.items():
            if name not in widths or level not in LEVELS:
                raise ValueError(
                    f"objective.mixing.{name}={level}; the modalities are {', '.join(widths)}, and each is mixed at "
                    f"the level {' or '.join(LEVELS)}"
                )
        if self.mixing.get("text") == "input":
            raise ValueError("objective.mixing.text=input: token ids cannot be mixed; set it to embedding")
        if not 0 <= switch <= 1:
            raise ValueError(f"objective.switch={switch}; set it to a share of the epochs, from 0 to 1")

    def setup(self, stage: str) -> None:
        """Find the labels in the data, if it comes from a DataModule, and see that they and the tables fit.

        Raises:
            ValueError: the data has no such attribute, more classes, rows without a label, or other tables.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "attributes"):
            return
        if self.tables:
            _check_tables(self.tables, {block: table.shape[1] for block, table in data.tables["train"].items()})
        known = list(data.attributes)
        if not known or self.attribute not in (None, *known):
            wanted = "labels" if self.attribute is None else f"the attribute '{self.attribute}'"
            raise ValueError(
                f"MixupContrast learns classes, and the data lacks {wanted}; it has {', '.join(known) or 'none'}: set "
                "data.train.labels (or attributes) and objective.attribute"
            )
        name = self.attribute or known[0]
        self._column = known.index(name)
        if len(data.attributes[name]) > self.num_classes:
            num = len(data.attributes[name])
            raise ValueError(f"'{name}' has {num} classes: set objective.num_classes={num}, not {self.num_classes}")
        labels = data.train.attributes.get(name, [""] * len(data.train))
        missing = [row for row, label in enumerate(labels) if not label]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(labels)} rows of data.train have no label '{name}', the first is "
                f"{data.train.key(missing[0])}: label them or leave them out (data.train.where)"
            )

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        return self.backbone(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return cast(nn.Module, self.text)(tokens)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of an evaluation batch, and the logits of every head whose modalities the set has.

        ``image`` and ``trunk`` are the embedding of the picture, or, in a flow without pictures, all embeddings side
        by side; ``text`` is that of the caption.
        """
        encoded = {name: encode(x) for name, encode, x in self._inputs(batch, evaluation=True) if x is not None}
        joint = torch.cat(list(encoded.values()), dim=1)
        image = encoded.get("image", joint)
        return Embeddings(image=image, trunk=image, text=encoded.get("text"), logits=self._logits(encoded))

    def step(self, batch: Batch) -> StepOutput:
        """Terms on the global batch."""
        missing = [name for name, _, x in self._inputs(batch) if x is None]
        if missing or "label" not in batch:
            lacking = ", ".join([*missing, *(["label"] if "label" not in batch else [])])
            raise ValueError(
                f"{type(self).__name__} needs {', '.join(self.modalities)} and labels, and the batch lacks {lacking}: "
                "choose data that has them, set tokenizer for text, or leave the modality out (objective.text=null)"
            )
        label = gather(batch["label"] if batch["label"].ndim == 1 else batch["label"][:, self._column].contiguous())
        if label.device.type == "cpu" and (label < 0).any():  # elsewhere the look would wait for the device
            raise ValueError(f"{int((label < 0).sum())} rows of a batch have no label: leave them out of the data")
        mixed_now, draws = "contrast" in self.weights and self._before_switch(), {}
        if mixed_now:
            seed = gather(batch["seed"])
            draws = {name: self.draw(seed, stream=number) for number, name in enumerate(self.modalities)}
        own: dict[str, Tensor] = {}
        mixed: dict[str, Tensor] = {}
        for name, encode, x in self._inputs(batch):
            x = cast(Tensor, x)
            if mixed_now and self.mixing[name] == "input":
                own[name], mixed[name] = encode(torch.cat([x, _partly(x, *draws[name])])).chunk(2)
                mixed[name] = gather(mixed[name].float())
            else:
                own[name] = encode(x)
        logits = {name: gather(value.float()) for name, value in self._logits(own).items()}
        terms = {name: F.cross_entropy(value, label) for name, value in logits.items()}
        whole = {name: gather(value.float()) for name, value in own.items()}  # (N, D) each
        if "contrast" in self.weights:
            mixed |= {n: mixup.mix(whole[n], perm=p, lam=lam) for n, (p, lam) in draws.items() if n not in mixed}
            terms["contrast"] = self._contrast(whole, mixed, draws)
        right = {f"{name}_accuracy": (value.argmax(1) == label).float().mean() for name, value in logits.items()}
        logs = dict(right) | {"mixed": float(mixed_now)}
        return StepOutput({name: terms[name] for name in self.weights}, whole, logs=logs)

    def _contrast(self, whole: dict[str, Tensor], mixed: dict[str, Tensor], draws: dict[str, Any]) -> Tensor:
        """Each modality with the next one."""
        names = list(whole)
        if len(whole[names[0]]) < 2:
            raise ValueError(
                f"{type(self).__name__} contrasts the samples of a batch, and this one has one: set data.batch_size"
            )
        values = []
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            if mixed:
                perm, lam = draws[name]
                partner = (mixed if self.mix_other else whole)[other]
                values.append(self.losses["mixed"](mixed[name], partner, perm=perm, lam=lam))
            else:
                values.append(self.losses["clean"](whole[name], whole[other]))
        return torch.stack(values).sum()

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of a cross-entropy ln C; of the contrast that of each pair of modalities, summed."""
        loss = self.losses["mixed" if self._before_switch() else "clean"]
        pair = at_chance(loss, num_rows=num_rows, dim=0)
        contrast = {"contrast": None if pair is None else len(self.modalities) * pair}
        return dict.fromkeys(self.heads, math.log(self.num_classes)) | contrast

    def _before_switch(self) -> bool:
        """Whether samples are mixed now; a function of the epoch, or step, alone."""
        if self.total_steps is None:
            return self.switch > 0
        if (epochs := self.trainer.max_epochs or -1) > 0:
            return self.current_epoch < int(self.switch * epochs)
        return self.step_number < int(self.switch * self.total_steps)

    def _inputs(self, batch: Batch, *, evaluation: bool = False) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
        """Name, encoder and rows of every modality; None where the batch lacks it."""
        if "image" in self.modalities:
            image = batch.get("image") if evaluation else next(iter(batch.get("views", [])), None)
            yield "image", self.backbone, image
        if self.text is not None:
            yield "text", self.text, batch.get("text")
        tables = batch.get("tables", [None] * len(self.tables)) if self.tables else []
        for (name, encoder), rows in zip(self.tables.items(), tables, strict=True):
            yield name, encoder, rows

    def _logits(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the heads whose modalities are there."""
        inputs = {f"{name}_head": value for name, value in found.items()}
        if len(found) == len(self.modalities):
            inputs["fusion"] = torch.cat(list(found.values()), dim=1)
        return {name: head(inputs[name]) for name, head in self.heads.items() if name in inputs}


def _partly(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """This rank's rows, mixed with partners on any rank."""
    mine = slice(rank() * len(x), (rank() + 1) * len(x))
    return mixup.blend(x, gather(x)[perm[mine]], lam=lam[mine])


def _out_features(name: str, encoder: nn.Module) -> int:
    """The width of a table's encoder, that of its last linear layer."""
    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"objective.tables.{name} has no linear layer; set it to one such as repr.models.heads.plain_mlp"
        )
    return layers[-1].out_features


def _check_tables(encoders: nn.ModuleDict, widths: Mapping[str, int]) -> None:
    ours = {
        name: next(m.in_features for m in encoder.modules() if isinstance(m, nn.Linear))
        for name, encoder in encoders.items()
    }
    if list(ours.items()) != list(widths.items()):
        told = [", ".join(f"{name} ({num})" for name, num in part.items()) or "none" for part in (ours, widths)]
        raise ValueError(
            f"objective.tables encode {told[0]}, and the data has the blocks {told[1]}: name the same blocks in the "
            "same order, and set the first of objective.tables.<name>.widths to the number of columns"
        )
