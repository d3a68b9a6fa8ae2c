"""Samples of any two classes drawn together in some dimensions: Hydra, later called SimLAP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from repr.batch import Batch, StepOutput
from repr.distributed import gather, means
from repr.drawing import Show, enlarge
from repr.losses.class_pairs import Pairs, Reduction, class_pair_contrast, draw_partners
from repr.losses.exchange import GATHER
from repr.losses.features import normalise
from repr.models.backbone import encode_views, width_of
from repr.models.batchnorm import synchronise
from repr.models.gate import Gate
from repr.models.heads import mlp
from repr.objectives.base import Objective
from repr.objectives.labels import learnt_column
from repr.objectives.loss_choice import Loss
from repr.objectives.views import view_sizes
from repr.optim import Optim

FEWEST_CLASSES = 3  # two that are drawn together, and one that is left


class ClassPairs(Objective):
    """A sample is to find those of another class, in the dimensions that a gate opens for the two classes.

    Methods: SimLAP, in its first version Hydra (Wu et al., 2024, arXiv 2410.18200). It learns from labels: probe what
    it has learned on other attributes. With ``pairs=identical gate=open`` it is supervised contrast, where a positive
    does not compete with the others.

    Flow: two views -> backbone, one pass -> head. Each sample draws a partner class; a learned gate of both classes
    weighs the dimensions, and the first view is to find the second views of all samples of that class among those of
    other classes than the two. BatchNorm of backbone and head sees both views, that of the gate the pairs of classes,
    all of all ranks. Exchanged: rows and labels of the second view.

    Terms: ``pairs``. Logs: ``pairs.chance``, which depends on the labels of the batch; ``positives``, so many a sample;
    ``temperature``; ``activation``, the sum of a gate, and ``gate_entropy`` of a dimension.

    Args:
        num_classes: that the data has.
        attribute: which labels are learnt; None: the first.
        pairs: ``arbitrary``: the partners are the classes of the batch in a random order; ``distinct``: any other
            class; ``identical``: the own class.
        gate: ``fused``: of the mean of both classes; ``product``: of those of each; ``open``: there is none.
        class_dim: width of a class's vector in the gate.
        gate_dim: width of the gate's hidden layer.
        temperature: at the start.
        learn_temperature: whether it is learned.
        renormalise: whether gated vectors are brought to unit length, so that closing dimensions costs nothing.
        reduction: ``rows``: each sample counts alike; ``pairs``: each pair.
    """

    TERMS = ("pairs",)
    PAIRWISE = ("pairs",)
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "pairs": "Cross-entropy of finding the samples of another class through the gate of the two; lower is better.",
        "positives": "Samples that a sample is to find, the mean of a batch.",
        "temperature": "By which the cosines of the contrast are divided.",
        "activation": "Sum of a gate over its dimensions; all of them is open, 0 is closed.",
        "gate_entropy": "Of a dimension of the gate, in nats; 0 is decided, .69 is undecided.",
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        attribute: str | None = None,
        pairs: Pairs = "arbitrary",
        gate: Literal["fused", "product", "open"] = "fused",
        hidden_dim: int = 2048,
        dim: int = 256,
        class_dim: int = 512,
        gate_dim: int = 1024,
        temperature: float = 0.1,
        learn_temperature: bool = True,
        renormalise: bool = False,
        reduction: Reduction = "rows",
        chunk_size: int | None = None,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        width = width_of(backbone)
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        if num_classes < FEWEST_CLASSES:
            raise ValueError(
                f"num_classes={num_classes}: samples of two classes are drawn together and away from those of others, "
                "so set it to 3 or more, and objective.attribute to labels with as many"
            )
        for name, value, known in (
            ("pairs", pairs, ("arbitrary", "distinct", "identical")),
            ("gate", gate, ("fused", "product", "open")),
            ("reduction", reduction, ("rows", "pairs")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value}; set it to {', '.join(known[:-1])} or {known[-1]}")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}; set it above 0")
        self.num_classes, self.attribute, self.pairs = num_classes, attribute, pairs
        self.head = nn.Sequential(*mlp([width, hidden_dim, dim], last_bias=False), nn.LayerNorm(dim))
        self.gate = None
        if gate != "open":
            self.gate = Gate(num_classes, dim, kind=gate, class_dim=class_dim, hidden_dim=gate_dim)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), learn_temperature)
        options: Any = {"renormalise": renormalise, "reduction": reduction, "chunk_size": chunk_size}
        self.loss: Loss = partial(class_pair_contrast, exchange=GATHER, **options)
        self._column = 0  # of `label`

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Fewer than two views."""
        if len(sizes := view_sizes(cfg)) < 2:
            yield f"{type(self).__name__} compares two views of a batch, and views has {len(sizes)}: set views=simclr"
        yield from super().config_faults(cfg)

    def negatives_fault(self) -> str | None:
        """Batches of one cluster would have few of the classes that are learnt."""
        return "it learns classes, of which a batch of one cluster has few"

    def setup(self, stage: str) -> None:
        """Find the labels in the data, if it comes from a DataModule.

        Raises:
            ValueError: the data has no such attribute, fewer than three classes, more than ``num_classes``, or rows
                without a label.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "attributes"):
            return
        self._column = learnt_column(data, type(self).__name__, self.attribute, self.num_classes, fewest=FEWEST_CLASSES)

    def step(self, batch: Batch) -> StepOutput:
        """The loss of the global batch."""
        views = batch["views"][:2]
        if len(views) < 2 or "label" not in batch:
            raise ValueError(
                f"{type(self).__name__} needs two views of a sample and its label, and the batch lacks one"
            )
        first, second = self.head(encode_views(self.backbone, views)).float().chunk(2)  # (B, D) each
        anchor = batch["label"] if batch["label"].ndim == 1 else batch["label"][:, self._column]
        labels, seed = gather(anchor), gather(batch["seed"])  # of all samples
        partner = GATHER.own(draw_partners(labels, seed, pairs=self.pairs, num_classes=self.num_classes))
        gate = torch.ones_like(first) if self.gate is None else self.gate(anchor, partner).float()
        classes: Any = {"anchor": anchor, "partner": partner, "labels": anchor}
        scale = self.logit_scale.exp()
        term = self.loss(first, second, gate, scale=scale, **classes)
        with torch.no_grad():
            same = torch.zeros_like(first[:, :1])
            logs = {"pairs.chance": self.loss(same, same, same, scale=1.0, **classes)}
            told = {"positives": ((partner.unsqueeze(1) == labels) & (labels >= 0)).sum(1).float().mean()}
            if self.gate is not None:
                told["activation"] = gate.sum(1).mean()
                told["gate_entropy"] = (torch.special.entr(gate) + torch.special.entr(1 - gate)).mean()
            logs |= means(told)
        return StepOutput({"pairs": term}, {"embedding": first}, logs={**logs, "temperature": 1 / scale.detach()})

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """``gates``: how much the gates of each class with itself have in common; white is all, black the least."""
        if self.gate is None:
            return {}
        classes = torch.arange(self.num_classes, device=self.device)
        gates = normalise(self.gate(classes, classes).float())
        common = gates @ gates.T  # cosines
        gray = 255 * (common - common.min()) / (1 - common.min()).clamp(min=1e-6)
        return {"gates": enlarge(gray.round().clamp(0, 255).byte().cpu().expand(3, -1, -1))}
