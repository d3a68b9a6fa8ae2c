"""Write docs/parity.md: what processes and slices change, for our objectives and for the losses of other libraries.

Run in the root of the repository; some ten minutes on two cores::

    python -m tests.parity --write
    python -m tests.parity --peers          # the other libraries alone

All groups of processes run on the CPU over gloo. Ours is what the tests compare (``tests/parity_cases.py``): whole
objectives of ``conf/objective`` in float64. A loss of another library is measured in the same way, in float32: two
views of the same pictures, a small ViT and a small head under DDP, the gradient of all parameters after ``backward``.
A library that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from repr.distributed import all_reduce, mean, rank, world_size
from repr.losses import contrastive, decorrelation, hypersphere
from repr.losses.clustering import sinkhorn, swapped_prediction
from repr.losses.exchange import GATHER, Exchange
from repr.models.backbone import backbone
from repr.models.heads import mlp
from tests.objectives.conftest import make_batch
from tests.parity_cases import (
    COLUMNS,
    ONE,
    VARIANTS,
    Record,
    can_be_sliced,
    column,
    differences,
    in_processes,
    relative,
)

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
VIT = {"image_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
NUM_PICTURES = 48
DIM, NUM_PROTOTYPES, SCALE, BIAS, TEMPERATURE = 16, 12, 10.0, -5.0, 0.1
Views = tuple[Tensor, Tensor, nn.Module]  # two embeddings (N, D), not normalised, and a layer of prototypes
Loss = Callable[..., Tensor]  # of Views


# Losses: of ours what the flows do with them -------------------------------------------------------------------------


def _ours(loss: Loss) -> Loss:
    return lambda a, b, prototypes: loss(a, b, exchange=GATHER)


def _our_swav(a: Tensor, b: Tensor, prototypes: nn.Module) -> Tensor:
    scores = [prototypes(F.normalize(x)) for x in (a, b)]
    assignments = [sinkhorn(s.detach(), epsilon=0.05, num_iters=3, all_reduce=all_reduce) for s in scores]
    loss = swapped_prediction(scores, assignments, assign_views=(0, 1), temperature=TEMPERATURE)
    return mean(loss)


def _our_vicreg(a: Tensor, b: Tensor, **exchange: Exchange) -> Tensor:
    spread = sum(
        25 * decorrelation.variance(x, **exchange) / 2 + decorrelation.covariance(x, **exchange) for x in (a, b)
    )
    return 25 * decorrelation.invariance(a, b, **exchange) + spread


def _our_hypersphere(a: Tensor, b: Tensor, **exchange: Exchange) -> Tensor:
    spread = (hypersphere.uniformity(a, **exchange) + hypersphere.uniformity(b, **exchange)) / 2
    return hypersphere.alignment(a, b, **exchange) + spread


def ours() -> Mapping[tuple[str, str], Loss]:
    """Losses by (name, flags)."""
    contrast = partial(contrastive.nt_xent, temperature=TEMPERATURE)
    correlation = partial(decorrelation.cross_correlation, off_diagonal_weight=0.005)
    return {
        ("CLIP", ""): _ours(partial(contrastive.clip, logit_scale=SCALE)),
        ("SigLIP", ""): _ours(partial(contrastive.sigmoid, logit_scale=SCALE, logit_bias=BIAS)),
        ("NT-Xent", ""): _ours(contrast),
        ("SwAV", ""): _our_swav,
        ("alignment + uniformity", ""): _ours(_our_hypersphere),
        ("VICReg", ""): _ours(_our_vicreg),
        ("Barlow Twins", ""): _ours(correlation),
    }


def open_clip() -> Mapping[tuple[str, str], Loss]:
    """Its CLIP with each choice of flags."""
    from open_clip.loss import ClipLoss, SigLipLoss

    def units(make: Callable[..., nn.Module], *more: float, **options: bool) -> Loss:
        def loss(a: Tensor, b: Tensor, prototypes: nn.Module) -> Tensor:
            module = make(rank=rank(), world_size=world_size(), **options)
            return module(F.normalize(a), F.normalize(b), torch.tensor(SCALE), *map(torch.tensor, more))

        return loss

    return {
        ("CLIP", "the default flags"): units(ClipLoss),
        ("CLIP", "gather_with_grad"): units(ClipLoss, gather_with_grad=True),
        ("CLIP", "local_loss"): units(ClipLoss, local_loss=True),
        ("CLIP", "local_loss, gather_with_grad"): units(ClipLoss, local_loss=True, gather_with_grad=True),
        ("SigLIP", ""): units(SigLipLoss, BIAS),
    }


def lightly() -> Mapping[tuple[str, str], Loss]:
    """Its losses as they are and, where they have a flag, gathered."""
    from lightly.loss import BarlowTwinsLoss, NTXentLoss, SwaVLoss, VICRegLoss
    from lightly.loss.hypersphere_loss import HypersphereLoss

    def views(make: Callable[..., nn.Module], **options: Any) -> Loss:
        return lambda a, b, prototypes: make(**options)(a, b)

    def swav(a: Tensor, b: Tensor, prototypes: nn.Module, **options: bool) -> Tensor:
        return SwaVLoss(temperature=TEMPERATURE, **options)([prototypes(F.normalize(x)) for x in (a, b)], [])

    both = {"the default flags": False, "gather_distributed": True}
    found: dict[tuple[str, str], Loss] = {}
    for words, on in both.items():
        found["NT-Xent", words] = views(NTXentLoss, temperature=TEMPERATURE, gather_distributed=on)
        found["SwAV", words.replace("gather", "sinkhorn_gather")] = partial(swav, sinkhorn_gather_distributed=on)
        found["VICReg", words] = views(VICRegLoss, gather_distributed=on)
        found["Barlow Twins", words] = views(BarlowTwinsLoss, gather_distributed=on)
    found["alignment + uniformity", "has no flag"] = views(HypersphereLoss, t=2.0)
    return found


def stable_pretraining() -> Mapping[tuple[str, str], Loss]:
    """Its losses, which have no flags."""
    from stable_pretraining.losses import joint_embedding, multimodal

    def views(module: nn.Module) -> Loss:
        return lambda a, b, prototypes: module(a, b)

    return {
        ("CLIP", ""): views(multimodal.CLIPLoss(temperature=1 / SCALE)),
        ("NT-Xent", ""): views(joint_embedding.NTXEntLoss(temperature=TEMPERATURE)),
        ("SwAV", ""): joint_embedding.SwAVLoss(temperature=TEMPERATURE),
        ("VICReg", ""): views(joint_embedding.VICRegLoss()),
        ("Barlow Twins", ""): views(joint_embedding.BarlowTwinsLoss()),
    }


LIBRARIES = {"ours": ours, "open_clip_torch": open_clip, "lightly": lightly, "stable-pretraining": stable_pretraining}


# One measurement -----------------------------------------------------------------------------------------------------


class TwoViews(nn.Module):
    """A small ViT, a head whose BatchNorm is synchronised, a loss of two views."""

    def __init__(self, loss: Loss, *, has_prototypes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = backbone("vit_tiny_patch16_224", **VIT)
        self.head = mlp([VIT["embed_dim"], 64, DIM])
        self.loss, self.prototypes = loss, nn.Linear(DIM, NUM_PROTOTYPES, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
        self.prototypes.requires_grad_(has_prototypes)

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss."""
        a, b = self.head(self.backbone(torch.cat(views[:2]))).chunk(2)
        return self.loss(a, b, self.prototypes)


def gradient(loss: Loss, *, has_prototypes: bool) -> Record:
    """The loss, averaged over processes, and the gradient."""
    model: nn.Module = TwoViews(loss, has_prototypes=has_prototypes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if world_size() > 1:
        model = DistributedDataParallel(model)
    views = [view.chunk(world_size())[rank()] for view in make_batch(NUM_PICTURES)["views"]]
    value = model(views)
    value.backward()
    return {
        "loss": mean(value.detach())[None],
        "grad": torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]),
    }


def gradients(library: str) -> dict[str, Record]:
    """Of every loss of a library, by its position."""
    losses = LIBRARIES[library]()
    return {str(i): gradient(loss, has_prototypes=name == "SwAV") for i, ((name, _), loss) in enumerate(losses.items())}


# The page ------------------------------------------------------------------------------------------------------------


def peers() -> list[str]:
    """The table of losses."""
    lines = [
        "| loss | of | flags | loss, 2 | ratio, 2 | cosine, 2 | loss, 3 | ratio, 3 | cosine, 3 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows, absent, installed = [], [], []
    for library, make in LIBRARIES.items():
        try:
            losses = make()
        except ImportError as error:
            absent.append(f"{library} is not installed ({error}), so its losses are left out.")
            continue
        one, cells = gradients(library), {}
        for world in (2, 3):
            records = in_processes(gradients, world, Path(tempfile.mkdtemp()), library)[0]
            for i, (name, flags) in enumerate(losses):
                record, reference = records[str(i)], one[str(i)]
                ratio = (record["grad"].norm() / reference["grad"].norm()).item()
                cosine = F.cosine_similarity(record["grad"].double(), reference["grad"].double(), dim=0).item()
                loss = (record["loss"] / reference["loss"]).item()
                cells.setdefault((name, flags), []).extend(f"{x:.3f}" for x in (loss, ratio, cosine))
        rows += [(name, library, flags, *cells[name, flags]) for name, flags in losses]
        installed.append(library if library == "ours" else f"{library} {_version(library)}")
        print(f"{library}: done", file=sys.stderr, flush=True)
    order = [name for name, _ in ours()]
    rows.sort(key=lambda row: order.index(row[0]))  # stable: libraries stay in order
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), "", ", ".join(installed[1:]) + ".", *absent]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "of unknown version"


def objectives() -> list[str]:
    """The table of our objectives."""
    groups = [(name, sliced) for name in COLUMNS for sliced in (False, True)][1:]
    (one,) = column(ONE, Path(), [*VARIANTS], sliced=False)
    found: dict[str, dict[tuple[str, bool], dict[str, float]]] = {variant: {} for variant in VARIANTS}
    for name, sliced in groups:
        variants = [variant for variant in VARIANTS if can_be_sliced(variant) or not sliced]
        first = column(name, Path(tempfile.mkdtemp()), variants, sliced=sliced)[0]
        for variant, record in first.items():
            difference = differences(record, one[variant])
            found[variant][name, sliced] = difference | {"image": relative(record["image"], one[variant]["image"])}
        print(f"{name}, {'slices' if sliced else 'whole'}: done", file=sys.stderr, flush=True)
    heads = [f"{name}, {'slices' if sliced else 'whole'}" for name, sliced in groups]
    lines = [
        f"| objective | {' | '.join(heads)} | loss | later | update | features |",
        f"| --- |{' :---: |' * len(groups)} ---: | ---: | ---: | ---: |",
    ]
    for variant, by_group in found.items():
        cells = [variant]
        for group in groups:
            difference = by_group.get(group)
            cells.append(f"{difference['ratio']:.3f} {difference['cosine']:.3f}" if difference else "BatchNorm")
        for key in ("loss", "later", "update", "image"):
            cells.append(f"{max(difference[key] for difference in by_group.values()):.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


PREFACE = """# One result on any number of processes

Written by `python -m tests.parity --write`; the tests hold the first table (`tests/test_parity.py`).

## Objectives

Every file of `conf/objective`, and some variants, with small towers in float64 on a global batch of 12: on one
process, under DDP and FSDP2 (gloo, CPU), each with the whole batch and with `micro_batch=2`. A cell is the length of
the gradient over that of one process on the whole batch, and the cosine between the two. The last columns are the
largest deviations of all cells: of the first loss and of the later one (over the larger of the two), of the
update after two steps of SGD with momentum, and of the features of 17 pictures, whose last batch no number of
processes here divides (length of the difference over the length). What remains are the losses and their reductions,
which are float32.
BatchNorm in an encoder sees the statistics of a slice: `micro_batch` warns of it, and the cell is left out.
"""
MIDDLE = """
## Losses, beside those of other libraries

Two views of 48 pictures, a small ViT and a head with synchronised BatchNorm, random weights, under DDP, float32;
nothing but the loss differs. Relative to one process with the same loss on the whole batch: the mean of the losses of
all processes, the length of the gradient and its cosine, on two and on three processes. Where the gradient is the same
but for its length, SGD takes other steps on another number of processes, and so does any optimizer once the gradient is
clipped; where the cosine is below 1, another objective is trained.
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/parity.md")
    parser.add_argument("--peers", action="store_true", help="only the losses beside those of other libraries")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [] if args.peers else [PREFACE, *objectives(), MIDDLE]
    text = "\n".join([*lines, *peers()]) + "\n"
    print(text)
    if args.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
