"""Try small variants of timm's families under every objective: what trains, and what is refused with which message.

Run in the root of the repository; all of it takes about an hour of two cores::

    python -m tools.backbones --out docs/backbones.md --workers 2
    python -m tools.backbones --backbones test_vit,vgg11 --objectives clip,mae

A pair passes the check that every run passes, then trains two steps on noise: at 64 pixels or, where that is refused,
at the model's own size, and with ``+backbone.global_pool=avg`` where the refusal names it. A traceback, or a parameter
that is to be trained and has no gradient, ends the program with status 1.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from hydra.utils import instantiate

from repr.batch import Batch
from repr.cli import user_message
from repr.config import CONF, compose
from repr.config_check import check
from repr.data.views import expand
from repr.models.backbone import backbone, width_of

OBJECTIVES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
FAMILIES = """
resnet10t resnext26ts seresnet18 res2net50_14w_8s resnest14d resnetv2_18 regnetx_002 regnety_002 regnetz_005 vgg11
densenet121 convnext_atto convnextv2_atto mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035
mobileone_s0 efficientnet_b0 tf_efficientnetv2_b0 efficientvit_b0 efficientvit_m0 lcnet_035 tinynet_e mnasnet_small
mixnet_s mambaout_femto ghostnet_050 repghostnet_050 inception_next_atto hgnetv2_b0 dla34 darknet17 eca_nfnet_l0
vovnet39a rexnet_100 repvgg_a0 repvit_m0_9 fastvit_t8 edgenext_xx_small mobilevit_xxs vit_tiny_patch16_224
vit_tiny_r_s16_p8_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
beit_base_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 maxvit_nano_rw_256
cait_xxs24_224 crossvit_tiny_240 xcit_nano_12_p16_224 eva02_tiny_patch14_224 levit_128s pvt_v2_b0 twins_svt_small
poolformer_s12 caformer_s18 tiny_vit_5m_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 mvitv2_tiny pit_ti_224
hiera_tiny_224
"""
SIZE, ROWS = 64, 4
HEAD = """# Backbones under objectives

Small variants of timm's families under files of `conf/objective`: two steps of the optimizer on noise, at 64 pixels
or, where that is refused, at the model's own size; `mean` is `+backbone.global_pool=avg`, which the refusal names. A
refusal comes before anything is built; the notes have the message of each. Written by `python -m tools.backbones`.
"""


class Outcome(NamedTuple):
    """What came of a pair."""

    kind: str  # trains, refused, untrained, crash
    told: str  # at how many pixels and with which options; the message; the parameters; the error


def outcome(objective: str, name: str) -> Outcome:
    """Try a backbone under an objective, at 64 pixels and at its own size."""
    own = timm.get_pretrained_cfg(name).input_size[-1]
    first, more = None, dict[str, Any]()
    for size in dict.fromkeys([SIZE, own]):
        found = _attempt(objective, name, size, more)
        if found.kind == "refused" and "+backbone.global_pool=avg" in found.told and not more:
            more = {"global_pool": "avg"} | ({"fc_norm": False} if "fc_norm=false" in found.told else {})
            found = _attempt(objective, name, size, more)
        first = first or found
        if found.kind != "refused" or " pixels" not in found.told:
            return found
    assert first is not None
    return first


def _attempt(objective: str, name: str, size: int, more: Mapping[str, Any]) -> Outcome:
    torch.manual_seed(0)
    cfg = _composed(objective).copy()
    cfg.image_size = cfg.small_size = size
    cfg.backbone = {**cfg.backbone, "name": name, **more}
    try:
        if objective.startswith("m3col"):  # no projection: widths are equal
            cfg.embed_dim = width_of(backbone(name, image_size=size))
        check(cfg)
        kind, told = _trained(cfg)
        return Outcome(kind, told or f"{size} px" + (", mean" if more else ""))
    except Exception as error:
        message = user_message(error)
        return Outcome("crash", f"{type(error).__name__}: {error}") if message is None else Outcome("refused", message)


@cache
def _composed(objective: str) -> Any:
    small = [
        f"data.batch_size={ROWS}",
        "text.layers=1",
        "text.width=64",
        "text.context_length=16",
        "optim.warmup_steps=0",
    ]
    return compose([f"objective={objective}", "backbone=resnet", *small])


def _trained(cfg: Any) -> tuple[str, str]:
    """Make two steps, and embed pictures; what comes of it, and of what is left untrained the names."""
    objective = instantiate(cfg.objective)
    optimizer, _ = objective.optim.build(objective, 10)
    batch = _noise(cfg)
    for _ in range(2):
        optimizer.zero_grad()
        loss = objective.total(objective.step(batch).terms)
        loss.backward()
        if not loss.isfinite():
            raise ArithmeticError(f"the loss is {loss.item()}")
        left = [
            n for n, parameter in objective.named_parameters() if parameter.requires_grad and parameter.grad is None
        ]
        if left:
            return "untrained", ", ".join(left)
        optimizer.step()
        objective.finish_step()
    with torch.no_grad():
        image = objective.eval().embed(Batch(image=batch["views"][0], text=batch["text"])).trunk
    if image.shape != (ROWS, width_of(objective.backbone)) or not image.isfinite().all():
        raise ArithmeticError(f"embeddings of shape {tuple(image.shape)}, or not finite")
    return "trains", ""


def _noise(cfg: Any) -> Batch:
    views = [view.size for view in expand(instantiate(cfg.views).values())]
    corners = 0.1 * torch.rand(ROWS, len(views), 2)
    return Batch(
        index=torch.arange(ROWS),
        seed=torch.arange(ROWS),
        views=[torch.randn(ROWS, 3, size, size) for size in views],
        boxes=torch.cat([corners, corners + 0.9], dim=2),
        text=torch.randint(1, 1000, (ROWS, cfg.text.context_length if cfg.get("text") else 8)),
        label=torch.arange(ROWS)[:, None],
    )


def row(name: str, objectives: Sequence[str]) -> dict[str, Outcome]:
    """The outcome of a backbone under each objective, found in a process of its own, which may die."""
    with ProcessPoolExecutor(1, initializer=_quiet) as pool:
        tried = [pool.submit(outcome, objective, name) for objective in objectives]
        died = Outcome("crash", "the process died")
        return {
            objective: died if isinstance(one.exception(), BrokenExecutor) else one.result()
            for objective, one in zip(objectives, tried, strict=True)
        }


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def page(table: dict[str, dict[str, Outcome]]) -> str:
    """The table as Markdown, with a note for each message."""
    objectives, notes = list(next(iter(table.values()))), dict[str, int]()

    def cell(name: str, found: Outcome) -> str:
        told = found.told.replace(name, "NAME")
        return told if found.kind == "trains" else f"{found.kind} [{notes.setdefault(told, len(notes) + 1)}]"

    rows = [
        f"| `{name}` | " + " | ".join(cell(name, found[o]) for o in objectives) + " |" for name, found in table.items()
    ]
    counts = {
        kind: sum(f.kind == kind for found in table.values() for f in found.values())
        for kind in ("trains", "refused", "untrained", "crash")
    }
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", "timm", "open_clip_torch"))
    told = f"{versions}. Of {sum(counts.values())} pairs: {', '.join(f'{counts[kind]} {kind}' for kind in counts)}."
    head = [f"| | {' | '.join(objectives)} |", "|---|" + "---|" * len(objectives)]
    listed = [f"{number}. {message}" for message, number in notes.items()]
    return "\n".join([HEAD, told, "", *head, *rows, "", *listed, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.backbones", description=__doc__.partition("\n")[0])
    parser.add_argument("--backbones", type=lambda names: names.split(","), default=FAMILIES.split())
    parser.add_argument("--objectives", type=lambda names: names.split(","), default=OBJECTIVES)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="where the table is written, as Markdown")
    options = parser.parse_args(arguments)
    table: dict[str, dict[str, Outcome]] = {}
    with ThreadPoolExecutor(options.workers) as pool:
        rows = pool.map(partial(row, objectives=options.objectives), options.backbones)
        for name, found in zip(options.backbones, rows, strict=True):
            table[name] = found
            for objective, (kind, told) in found.items():
                print(f"{name:32} {objective:16} {kind:10} {told}", flush=True)
    if options.out:
        options.out.write_text(page(table), encoding="utf-8")
    return any(found.kind in ("untrained", "crash") for row in table.values() for found in row.values())


if __name__ == "__main__":
    sys.exit(main())
