"""Step time of methods with a teacher: ours, lightly's, stable-pretraining's, on the same backbone.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.teacher_step_time            # at most half an hour on two cores
    python -m benchmarks.teacher_step_time --quick    # one small case of each, at most three minutes
    python -m benchmarks.teacher_step_time --write    # also writes benchmarks/results/teacher_step_time.md

As in :mod:`benchmarks.step_time`; a step ends with the update of the teacher. DINO alone takes the small views. lightly
has no MoCo v3. iBOT and DINOv2, on a ViT, hide 30 % of the patches of all pictures, which each library draws in its own
way; stable-pretraining's DINOv2 is without KoLeo. All have the same blocks of I-JEPA, four a picture: the paper and
lightly predict them one by one, stable-pretraining in one pass, as ours with ``together``. The center of iBOT's patches
follows all of them, as the authors' does, for which the head sees all: 3 % of the operations of a step. lightly's
follows the hidden ones alone, as ours with ``center_seen=False``.
"""

from __future__ import annotations

import argparse
import copy
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks import step_time
from benchmarks.report import publish
from benchmarks.step_time import BACKBONES, RECIPES, ROOT, Candidate, Heads, Times, head, measure, rows, trunk
from repr.batch import Batch
from repr.models.backbone import backbone, width_of
from repr.models.decoder import Decoder
from repr.models.masking import TokenMasking
from repr.models.target_blocks import TargetBlocks
from repr.objectives.jepa import JEPA
from repr.objectives.momentum import Momentum
from repr.objectives.self_distillation import SelfDistillation

RESULTS = ROOT / "benchmarks/results/teacher_step_time.md"
HEADS = step_time.HEADS._replace(dim=256, prototypes=8192, temperature=0.2, decoder=(384, 6))
HIDDEN_SHARE = 0.3  # of iBOT's patches
Views = Sequence[Tensor]
Make = Callable[..., Candidate]  # of a backbone, large views, small ones and, in this file, heads


def our(flow: Any, views: Views) -> Candidate:
    """One of our flows, whose ``finish_step`` moves the teacher."""
    batch = Batch(views=list(views), seed=torch.arange(len(views[0]), device=views[0].device))
    return flow, lambda: flow.total(flow.step(batch).terms), flow.finish_step


def our_byol(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    return our(Momentum(model, hidden_dim=heads.hidden, dim=heads.dim, weights={"regression": 1}), large)


def our_mocov3(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    options: Any = {"num_layers": 3, "last_norm": "plain", "before_step": True}
    return our(Momentum(model, hidden_dim=heads.hidden, dim=heads.dim, weights={"contrast": 1}, **options), large)


def our_dino(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    return our(SelfDistillation(model, hidden_dim=heads.hidden, num_prototypes=heads.prototypes), [*large, *small])


def our_ibot(
    model: nn.Module, large: Views, small: Views, heads: Heads = HEADS, *, center_seen: bool = True
) -> Candidate:
    hidden = TokenMasking(kind="random", ratio=(HIDDEN_SHARE, HIDDEN_SHARE), share=1.0)
    options: Any = {"hidden_dim": heads.hidden, "num_prototypes": heads.prototypes, "share_head": False}
    options["center_seen"] = center_seen
    return our(SelfDistillation(model, masking=hidden, weights={"views": 1, "patches": 1}, **options), large)


def our_dinov2(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    hidden = TokenMasking(kind="random", ratio=(HIDDEN_SHARE, HIDDEN_SHARE), share=1.0)
    options: Any = {"hidden_dim": heads.hidden, "num_prototypes": heads.prototypes}
    options |= {"share_head": False, "learn_length": True, "weights": {"views": 1, "patches": 1, "koleo": 0.1}}
    return our(SelfDistillation(model, masking=hidden, centering="sinkhorn", **options), large)


def our_ijepa(
    model: nn.Module, large: Views, small: Views, heads: Heads = HEADS, *, together: bool = False
) -> Candidate:
    width, depth = heads.decoder
    decoder = partial(Decoder, dim=width, depth=depth, num_heads=width // 64)
    return our(JEPA(model, decoder=decoder, together=together), large[:1])


def following(heads: Heads, *pairs: tuple[nn.Module, nn.Module]) -> Callable[[], None]:
    """What lets teachers follow their students by lightly, of pairs of student and teacher."""
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    for _, teacher in pairs:
        deactivate_requires_grad(teacher)

    def follow() -> None:
        for student, teacher in pairs:
            update_momentum(student, teacher, heads.momentum())

    return follow


def lightly_byol(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    projector = BYOLProjectionHead(width_of(model), heads.hidden, heads.dim)
    predictor = BYOLPredictionHead(heads.dim, heads.hidden, heads.dim)
    criterion = NegativeCosineSimilarity()
    slow_model, slow_projector = copy.deepcopy(model), copy.deepcopy(projector)
    follow = following(heads, (model, slow_model), (projector, slow_projector))

    def step() -> Tensor:
        queries = [predictor(projector(model(view).flatten(start_dim=1))) for view in large]
        with torch.no_grad():
            keys = [slow_projector(slow_model(view).flatten(start_dim=1)).detach() for view in large]
        return 0.5 * (criterion(queries[0], keys[1]) + criterion(queries[1], keys[0]))

    return nn.ModuleList([model, projector, predictor]), step, follow


def lightly_dino(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    width, widths = width_of(model), (heads.hidden, heads.dim, heads.prototypes)
    head, slow_head = (DINOProjectionHead(width, *widths, freeze_last_layer=1) for _ in range(2))
    criterion = DINOLoss(output_dim=heads.prototypes, teacher_temp=0.04)
    slow_model = copy.deepcopy(model)
    follow = following(heads, (model, slow_model), (head, slow_head))

    def step() -> Tensor:
        with torch.no_grad():
            teacher = [slow_head(slow_model(view).flatten(start_dim=1)) for view in large]
        student = [head(model(view).flatten(start_dim=1)) for view in (*large, *small)]
        return criterion(teacher, student, teacher_temp=0.04)

    return nn.ModuleList([model, head]), step, follow


def lightly_ibot(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from lightly.loss import DINOLoss, IBOTPatchLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM

    vit: Any = model.to(memory_format=torch.contiguous_format)  # its initialisation needs that
    student, width, (rows, columns) = MaskedVisionTransformerTIMM(vit=vit), vit.embed_dim, vit.patch_embed.grid_size
    widths = width, heads.hidden, heads.dim, heads.prototypes
    head, cell_head, slow_head, slow_cell_head = (
        DINOProjectionHead(*widths, freeze_last_layer=1, norm_last_layer=True) for _ in range(4)
    )
    teacher = copy.deepcopy(student)
    follow = following(heads, (student, teacher), (head, slow_head), (cell_head, slow_cell_head))
    criterion, cell_criterion = (kind(heads.prototypes, teacher_temp=0.04) for kind in (DINOLoss, IBOTPatchLoss))
    num = rows * columns

    def step() -> Tensor:
        images = torch.cat(list(large))
        order = torch.rand(len(images), num, device=images.device).argsort(1)
        mask = torch.zeros(len(images), 1 + num, dtype=torch.bool, device=images.device)
        mask.scatter_(1, 1 + order[:, : round(HIDDEN_SHARE * num)], True)
        with torch.no_grad():
            seen = teacher.encode(images)
            targets, cell_targets = slow_head(seen[:, 0]), slow_cell_head(seen[mask])
        tokens = student.encode(images, mask=mask)
        scores, cells = head(tokens[:, 0]), cell_head(tokens[mask])
        pairs = [list(x.chunk(len(large))) for x in (targets, scores)]
        hidden = mask[:, 1:].unflatten(1, (rows, columns))
        return criterion(*pairs, teacher_temp=0.04) + cell_criterion(cell_targets, cells, hidden)

    return nn.ModuleList([student, teacher, head, cell_head, slow_head, slow_cell_head]), step, follow


def lightly_ijepa(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM

    vit: Any = model.to(memory_format=torch.contiguous_format)
    student, grid, images = MaskedVisionTransformerTIMM(vit=vit), vit.patch_embed.grid_size, large[0]
    teacher, (width, depth) = copy.deepcopy(student), heads.decoder
    predictor = IJEPAPredictorTIMM(
        num_patches=vit.patch_embed.num_patches, depth=depth, mlp_dim=vit.embed_dim, predictor_embed_dim=width,
        num_heads=width // 64,
    )  # fmt: skip
    follow, blocks, first = following(heads, (student, teacher)), TargetBlocks(), vit.num_prefix_tokens
    seed, steps = torch.arange(len(images), device=images.device), count()

    def step() -> Tensor:
        context, targets = blocks.draw(seed, grid, step=next(steps))  # as ours are
        masks = list(targets.unbind(1))
        with torch.no_grad():
            whole = teacher.encode(images)[:, first:]
            whole = F.layer_norm(whole, whole.shape[-1:])
            target = torch.cat([utils.get_at_index(whole, mask) for mask in masks])
        tokens = student.encode(images, idx_keep=F.pad(context + first, (first, 0)))[:, first:]
        return F.smooth_l1_loss(predictor(tokens, context, masks), target)

    return nn.ModuleList([student, teacher, predictor]), step, follow


def stable(module: Any, step: Callable[[], Tensor], heads: Heads = HEADS) -> Candidate:
    """A module of stable-pretraining, whose wrappers move their teachers."""
    wrappers = [part for part in module.modules() if hasattr(part, "update_teacher")]

    def follow() -> None:
        for wrapper in wrappers:
            wrapper.ema_coefficient.fill_(heads.momentum())
            wrapper.update_teacher()

    return module.train(), step, follow


def stable_byol(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from stable_pretraining.methods.byol import BYOL

    widths = heads.hidden, heads.dim
    module = BYOL(model, projector_dims=widths, predictor_dims=widths)
    return stable(module, lambda: module(*large).loss, heads)


def stable_mocov3(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from stable_pretraining.methods.mocov3 import MoCov3

    widths = heads.hidden, heads.hidden, heads.dim
    module = MoCov3(model, projector_dims=widths, predictor_hidden_dim=heads.hidden, temperature=heads.temperature)
    return stable(module, lambda: module(*large).loss, heads)


def stable_dino(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from stable_pretraining.methods.dino import DINO

    widths: Any = {"projector_hidden_dim": heads.hidden, "projector_bottleneck_dim": heads.dim}
    module = DINO(model, n_prototypes=heads.prototypes, **widths)
    return stable(module, lambda: module(global_views=large, local_views=small).loss, heads)


def stable_heads(heads: Heads) -> dict[str, Any]:
    """Of iBOT and DINOv2."""
    num = dict.fromkeys(("n_cls_prototypes", "n_patch_prototypes"), heads.prototypes)
    return num | {"projector_hidden_dim": heads.hidden, "projector_bottleneck_dim": heads.dim}


def stable_ibot(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from stable_pretraining.methods.ibot import iBOT

    module = iBOT(model, mask_ratio=HIDDEN_SHARE, image_size=large[0].shape[-1], **stable_heads(heads))
    return stable(module, lambda: module(global_views=large).loss, heads)


def stable_dinov2(model: nn.Module, large: Views, small: Views, heads: Heads = HEADS) -> Candidate:
    from stable_pretraining.methods.dinov2 import DINOv2

    module = DINOv2(model, mask_ratio=HIDDEN_SHARE, image_size=large[0].shape[-1], **stable_heads(heads))
    return stable(module, lambda: module(global_views=large).loss, heads)


class OurBlocks(nn.Module):
    """Ours, as stable-pretraining asks for them."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.steps, self.seed = count(), torch.arange(num)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Namespace:
        context, blocks = TargetBlocks().draw(self.seed.to(patches.device), (rows, columns), step=next(self.steps))
        return Namespace(context_idx=context, target_idx=blocks.flatten(1))


def stable_ijepa(
    model: nn.Module, large: Views, small: Views, heads: Heads = HEADS, *, our_blocks: bool = False
) -> Candidate:
    from stable_pretraining.methods.ijepa import IJEPA

    width, depth = heads.decoder
    module = IJEPA(model, predictor_embed_dim=width, predictor_depth=depth)
    if our_blocks:
        module.masking = OurBlocks(len(large[0]))
    return stable(module, lambda: module(large[0]).loss, heads)


METHODS: dict[str, dict[str, Make]] = {
    "BYOL": {"ours": our_byol, "lightly": lightly_byol, "stable-pretraining": stable_byol},
    "MoCo v3": {"ours": our_mocov3, "stable-pretraining": stable_mocov3},
    "DINO": {"ours": our_dino, "lightly": lightly_dino, "stable-pretraining": stable_dino},
    "iBOT": {"ours": our_ibot, "lightly": lightly_ibot, "stable-pretraining": stable_ibot},
    "iBOT, center of hidden patches": {"ours": partial(our_ibot, center_seen=False), "lightly": lightly_ibot},
    "DINOv2": {"ours": our_dinov2, "stable-pretraining": stable_dinov2},
    "I-JEPA": {"ours": our_ijepa, "lightly": lightly_ijepa},
    "I-JEPA, one pass": {
        "ours": partial(our_ijepa, together=True),
        "stable-pretraining": partial(stable_ijepa, our_blocks=True),
    },
}
OF_PATCHES = ("iBOT", "iBOT, center of hidden patches", "DINOv2", "I-JEPA", "I-JEPA, one pass")


def step_times(libraries: dict[str, Make], recipe: str, encoder: Callable[[int], nn.Module], seconds: float) -> Times:
    """A method by every library that has it, ours twice; the encoder is one for views of a size."""
    size, large_sizes, small_sizes = RECIPES[recipe]
    generator = torch.Generator().manual_seed(0)
    large, small = (
        [torch.randn(size, 3, side, side, generator=generator) for side in sides]
        for sides in (large_sizes, small_sizes)
    )
    makes = {
        library: partial(make, encoder(large_sizes[0]), large, small) for library, make in twice(libraries).items()
    }
    return measure(makes, seconds)


def encoder(method: str, name: str, size: int) -> nn.Module:
    """The backbone of a method; those that hide patches take views of one size."""
    return backbone(name, image_size=size) if method in OF_PATCHES else trunk(name, size)


def twice(libraries: dict[str, Make]) -> dict[str, Make]:
    """The libraries, with a second instance of ours, which tells the noise."""
    return {"ours": libraries["ours"], "ours again": libraries["ours"]} | libraries


def page(
    doc: str,
    title: str,
    results: Path,
    methods: dict[str, dict[str, Make]],
    *,
    all_views: Collection[str],
    fits: Callable[[str, str], bool],
    num_recipes: int | None = None,
) -> None:
    """The command line of a page of step times.

    Args:
        doc: what it does.
        title: of the page.
        results: where the page is written; its name is the script's.
        methods: name -> library -> what makes its step.
        all_views: methods that take the small views, too.
        fits: whether a method takes a backbone, by both names.
        num_recipes: so many of the recipes are measured; None: all.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 at the smaller recipe, few steps")
    parser.add_argument("--write", action="store_true", help=f"write {results.relative_to(ROOT)}")
    parser.add_argument("--seconds", type=float, help="of measuring a case; default 120, quick 20")
    parser.add_argument("--only", choices=methods, help="one method")
    args = parser.parse_args()
    seconds, few = args.seconds or (20 if args.quick else 120), 1 if args.quick else None
    lines = head(title, results.stem)
    for recipe in islice(RECIPES, few or num_recipes):
        for shown, name in islice(BACKBONES.items(), few):
            for method, libraries in methods.items():
                if args.only in (None, method) and fits(method, shown):
                    views = recipe if method in all_views else recipe.split(" + ")[0]
                    first = f"{method} | {views}, batch {RECIPES[recipe][0]} | {shown}"
                    lines += rows(first, step_times(libraries, recipe, partial(encoder, method, name), seconds))
    publish(lines, results if args.write else None)


def main() -> None:
    page(
        __doc__ or "",
        "Step time of methods with a teacher",
        RESULTS,
        METHODS,
        all_views=("DINO",),
        fits=lambda method, backbone: backbone.startswith("ViT") or method not in OF_PATCHES,
    )


if __name__ == "__main__":
    main()
