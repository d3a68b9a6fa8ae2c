"""Step time of further methods of views: ours, lightly's, stable-pretraining's, on the same backbone.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.pair_step_time            # at most half an hour on two cores
    python -m benchmarks.pair_step_time --quick    # a few steps of each on a ResNet-18, at most three minutes
    python -m benchmarks.pair_step_time --write    # also writes benchmarks/results/pair_step_time.md

Barlow Twins, VICReg, LeJEPA, SimSiam, MoCo v2 and DenseCL, as in :mod:`benchmarks.step_time`, with the widths of the
papers' heads and a queue of 65,536. LeJEPA alone takes the small views; DenseCL takes a backbone with a map.
lightly's queue of DenseCL keeps all cells of the keys, ours a mean of each picture as the authors' does;
stable-pretraining's MoCo v2 embeds the first view by the teacher besides.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.step_time import ROOT, Candidate
from benchmarks.teacher_step_time import HEADS, Make, Views, following, our, page, stable
from repr.models.backbone import width_of
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.momentum import Momentum

RESULTS = ROOT / "benchmarks/results/pair_step_time.md"
WIDE, HIDDEN, DIM, QUEUE = 8192, 2048, 128, 65536  # WIDE: of the heads of Barlow Twins and VICReg
OUR_WIDE: Any = {"hidden_dim": WIDE, "dim": WIDE, "last_bias": False}
PREDICTOR, SIMSIAM = 512, 2048  # hidden layer of SimSiam's predictor; width that it predicts
LEJEPA_DIM, LEJEPA_WEIGHT = 64, 0.05  # lightly's
DENSE = 0.5  # share of the loss of cells


def our_joint(model: nn.Module, views: Views, **options: Any) -> Candidate:
    return our(JointEmbedding(model, num_layers=3, **options), views)


def our_barlow_twins(model: nn.Module, large: Views, small: Views) -> Candidate:
    return our_joint(model, large, weights={"correlation": 1}, **OUR_WIDE)


def our_vicreg(model: nn.Module, large: Views, small: Views) -> Candidate:
    return our_joint(model, large, weights={"invariance": 25, "variance": 25, "covariance": 2}, **OUR_WIDE)


def our_lejepa(model: nn.Module, large: Views, small: Views) -> Candidate:
    weights = {"centred_invariance": 1 - LEJEPA_WEIGHT, "sigreg": LEJEPA_WEIGHT}
    return our_joint(model, [*large, *small], hidden_dim=HIDDEN, dim=LEJEPA_DIM, weights=weights)


def our_simsiam(model: nn.Module, large: Views, small: Views) -> Candidate:
    heads: Any = {"num_layers": 3, "last_norm": "plain", "last_bias": True, "predictor_dim": PREDICTOR}
    flow = Momentum(model, momentum=None, hidden_dim=HIDDEN, dim=SIMSIAM, weights={"regression": 0.25}, **heads)
    return our(flow, large)


def our_mocov2(model: nn.Module, large: Views, small: Views, **weights: float) -> Candidate:
    heads: Any = {"head_norm": False, "last_bias": True, "predictor_layers": 0, "before_step": True}
    momentum = HEADS.momentum()
    queue: Any = {"queue_length": QUEUE, "one_way": True, "momentum": momentum, "final_momentum": momentum}
    flow = Momentum(model, hidden_dim=HIDDEN, dim=DIM, weights=weights or {"contrast": 1}, **heads, **queue)
    return our(flow, large)


def our_densecl(model: nn.Module, large: Views, small: Views) -> Candidate:
    return our_mocov2(model, large, small, contrast=1 - DENSE, dense=DENSE)


def lightly_joint(model: nn.Module, projector: nn.Module, criterion: nn.Module, large: Views) -> Candidate:
    """Two views, one after the other, through backbone and head, as lightly's examples have it."""
    parts = nn.ModuleList([model, projector])
    return parts, lambda: criterion(*(projector(model(view).flatten(start_dim=1)) for view in large))


def lightly_barlow_twins(model: nn.Module, large: Views, small: Views) -> Candidate:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    return lightly_joint(model, BarlowTwinsProjectionHead(width_of(model), WIDE, WIDE), BarlowTwinsLoss(), large)


def lightly_vicreg(model: nn.Module, large: Views, small: Views) -> Candidate:
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    return lightly_joint(model, VICRegProjectionHead(width_of(model), WIDE, WIDE), VICRegLoss(), large)


def lightly_lejepa(model: nn.Module, large: Views, small: Views) -> Candidate:
    from lightly.loss import LeJEPALoss
    from lightly.models.modules import LeJEPAProjectionHead

    projector = LeJEPAProjectionHead(width_of(model), HIDDEN, LEJEPA_DIM)
    criterion = LeJEPALoss(lambda_param=LEJEPA_WEIGHT)

    def step() -> Tensor:
        local, global_ = (torch.stack([projector(model(view)) for view in views]) for views in (small, large))
        return criterion(local_proj=local, global_proj=global_)

    return nn.ModuleList([model, projector]), step


def lightly_simsiam(model: nn.Module, large: Views, small: Views) -> Candidate:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    projector = SimSiamProjectionHead(width_of(model), HIDDEN, SIMSIAM)
    predictor, criterion = SimSiamPredictionHead(SIMSIAM, PREDICTOR, SIMSIAM), NegativeCosineSimilarity()

    def step() -> Tensor:
        projected = [projector(model(view).flatten(start_dim=1)) for view in large]
        queries = [predictor(rows) for rows in projected]
        return 0.5 * (criterion(queries[0], projected[1].detach()) + criterion(queries[1], projected[0].detach()))

    return nn.ModuleList([model, projector, predictor]), step


def lightly_mocov2(model: nn.Module, large: Views, small: Views) -> Candidate:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    projector, criterion = MoCoProjectionHead(width_of(model), HIDDEN, DIM), queue_loss(NTXentLoss)
    slow_model, slow_projector = copy.deepcopy(model), copy.deepcopy(projector)
    follow = following(HEADS, (model, slow_model), (projector, slow_projector))

    def step() -> Tensor:
        follow()
        query = projector(model(large[0]).flatten(start_dim=1))
        with torch.no_grad():
            key = slow_projector(slow_model(large[1]).flatten(start_dim=1)).detach()
        return criterion(query, key)

    return nn.ModuleList([model, projector, slow_model, slow_projector, criterion]), step


def queue_loss(loss: Any) -> nn.Module:
    return loss(temperature=0.2, memory_bank_size=(QUEUE, DIM))


def lightly_densecl(model: nn.Module, large: Views, small: Views) -> Candidate:
    from lightly.loss import NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import DenseCLProjectionHead

    heads = nn.ModuleList(DenseCLProjectionHead(width_of(model), HIDDEN, DIM) for _ in range(2))
    losses = nn.ModuleList(queue_loss(NTXentLoss) for _ in range(2))
    slow_model, slow_heads = copy.deepcopy(model), copy.deepcopy(heads)
    follow = following(HEADS, (model, slow_model), (heads, slow_heads))

    def encode(encoder: Any, projectors: Any, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = encoder.forward_features(view)
        cells = features.flatten(start_dim=2).mT  # (B, S, C)
        return projectors[0](features.mean((2, 3))), F.normalize(cells, dim=2), projectors[1](cells)

    def step() -> Tensor:
        follow()
        query, cells, queries = encode(model, heads, large[0])
        with torch.no_grad():
            key, key_cells, keys = encode(slow_model, slow_heads, large[1])
            keys = utils.select_most_similar(cells, key_cells, keys)
        whole, dense = losses[0](query, key), losses[1](queries.flatten(end_dim=1), keys.flatten(end_dim=1))
        return (1 - DENSE) * whole + DENSE * dense

    return nn.ModuleList([model, heads, slow_model, slow_heads, losses]), step


def stable_barlow_twins(model: nn.Module, large: Views, small: Views) -> Candidate:
    from stable_pretraining.methods.barlow_twins import BarlowTwins

    module = BarlowTwins(model, projector_dims=(WIDE, WIDE, WIDE))
    return stable(module, lambda: module(*large).loss)


def stable_vicreg(model: nn.Module, large: Views, small: Views) -> Candidate:
    from stable_pretraining.methods.vicreg import VICReg

    module = VICReg(model, projector_dims=(WIDE, WIDE, WIDE))
    return stable(module, lambda: module(*large).loss)


def stable_lejepa(model: nn.Module, large: Views, small: Views) -> Candidate:
    from stable_pretraining.methods.lejepa import LeJEPA
    from torchvision.ops import MLP

    projector = MLP(width_of(model), [HIDDEN, HIDDEN, LEJEPA_DIM], norm_layer=nn.BatchNorm1d)
    module: Any = LeJEPA("test_vit", projector=projector)  # it takes a name alone
    module.backbone = model
    return stable(module, lambda: module(global_views=list(large), local_views=list(small)).loss)


def stable_simsiam(model: nn.Module, large: Views, small: Views) -> Candidate:
    from stable_pretraining.methods.simsiam import SimSiam

    module = SimSiam(model, projector_dim=SIMSIAM, predictor_hidden_dim=PREDICTOR)
    return stable(module, lambda: module(*large).loss)


def stable_mocov2(model: nn.Module, large: Views, small: Views) -> Candidate:
    from stable_pretraining.methods.mocov2 import MoCov2

    module = MoCov2(model, projector_dims=(HIDDEN, DIM), queue_length=QUEUE)
    return stable(module, lambda: module(*large).loss)


METHODS: dict[str, dict[str, Make]] = {
    "Barlow Twins": {
        "ours": our_barlow_twins,
        "lightly": lightly_barlow_twins,
        "stable-pretraining": stable_barlow_twins,
    },
    "VICReg": {"ours": our_vicreg, "lightly": lightly_vicreg, "stable-pretraining": stable_vicreg},
    "LeJEPA": {"ours": our_lejepa, "lightly": lightly_lejepa, "stable-pretraining": stable_lejepa},
    "SimSiam": {"ours": our_simsiam, "lightly": lightly_simsiam, "stable-pretraining": stable_simsiam},
    "MoCo v2": {"ours": our_mocov2, "lightly": lightly_mocov2, "stable-pretraining": stable_mocov2},
    "DenseCL": {"ours": our_densecl, "lightly": lightly_densecl},
}


def main() -> None:
    page(
        __doc__ or "",
        "Step time of further methods of views",
        RESULTS,
        METHODS,
        all_views=("LeJEPA",),
        fits=lambda method, backbone: method != "DenseCL" or not backbone.startswith("ViT"),  # which has no map
        num_recipes=1,
    )


if __name__ == "__main__":
    main()
