"""Step time of SimCLR, SwAV and MAE: ours, lightly's, stable-pretraining's, on the same backbone; and the data side.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.step_time            # at most half an hour on two cores
    python -m benchmarks.step_time --quick    # one small case of each, at most three minutes
    python -m benchmarks.step_time --write    # also writes benchmarks/results/step_time.md

A step is forward, loss, backward of a batch that is ready, float32. All implementations get the same pictures and a
backbone of the same class; a peer is its own modules and loss, put together as in its documentation. They are measured
in turn, a step each, so that whatever else the machine does hits all alike. The least time of each counts, by the clock
and in seconds of CPU, and the noise is how far a second instance of ours is from the first. SimCLR takes the large
views only. A library that is not installed is left out.

MAE takes one large view and a ViT. Ours at ratio 0.75 stands beside ours with all patches but one, which shows whether
removed patches cost anything, and beside lightly's; plain pixels are the target, as in lightly's example.

The data side: pictures a second that one worker hands over, decoded, cropped and, where the library does that there,
coloured. Ours leaves colour to the training device; what that costs is given too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.report import hardware, publish
from repr.batch import Batch
from repr.data.colour import colour_views
from repr.data.datamodule import DataModule
from repr.data.sources.emoji import Emoji
from repr.data.views import View
from repr.errors import first_line
from repr.models.backbone import backbone
from repr.models.decoder import Decoder
from repr.models.masking import Masking
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.masked_autoencoders import MaskedViews
from repr.objectives.swav import SwAV

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/step_time.md"
FAILURES = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError)
# name -> batch size, sizes of the large views, sizes of the small ones
RECIPES = {"2 x 96 + 4 x 48": (32, [96] * 2, [48] * 4), "2 x 224 + 6 x 96": (8, [224] * 2, [96] * 6)}
BACKBONES = {"ResNet-18": "resnet18", "ViT-S": "vit_small_patch16_224"}
Step = Callable[[], Tensor]  # forward and loss
Candidate = tuple[Any, ...]  # a module, its step, and what comes after backward, such as the update of a teacher
CPU = torch.device("cpu")


class Heads(NamedTuple):
    """What is built on a backbone; the widths are those of the papers.

    Attributes:
        hidden: width of the hidden layers.
        dim: width of the embeddings.
        prototypes: their number.
        temperature: of a contrast.
        decoder: width and layers of what predicts patches.
        momentum: of a teacher, asked for at each step.
    """

    hidden: int = 2048
    dim: int = 128
    prototypes: int = 3000
    temperature: float = 0.1
    decoder: tuple[int, int] = (512, 8)
    momentum: Callable[[], float] = lambda: 0.99


HEADS = Heads()
Times = dict[str, list[tuple[float, float]]]  # library -> seconds by the clock and of CPU of each step


def trunk(name: str, size: int) -> nn.Module:
    """A timm model; a ViT interpolates its positions for views of another size."""
    options = {"dynamic_img_size": True} if name.startswith("vit") else {}
    return backbone(name, image_size=size, **options)


# SimCLR and SwAV in each library -------------------------------------------------------------------------------------


def ours(
    method: str, model: nn.Module, large: list[Tensor], small: list[Tensor], heads: Heads = HEADS
) -> tuple[nn.Module, Step]:
    if method == "SimCLR":
        flow: Any = JointEmbedding(model, hidden_dim=heads.hidden, dim=heads.dim, last_norm="affine")
        batch = Batch(views=large)
    else:
        flow = SwAV(model, hidden_dim=heads.hidden, dim=heads.dim, num_prototypes=heads.prototypes)
        batch = Batch(views=[*large, *small])
    return flow, lambda: flow.total(flow.step(batch).terms)


def lightly(
    method: str, model: nn.Module, large: list[Tensor], small: list[Tensor], heads: Heads = HEADS
) -> tuple[nn.Module, Step]:
    from lightly.loss import NTXentLoss, SwaVLoss
    from lightly.models.modules import SimCLRProjectionHead, SwaVProjectionHead, SwaVPrototypes

    widths = int(model.num_features), heads.hidden, heads.dim
    if method == "SimCLR":
        head, criterion = SimCLRProjectionHead(*widths), NTXentLoss(temperature=heads.temperature)
        parts = nn.ModuleList([model, head])
        return parts, lambda: criterion(*(head(model(view)) for view in large))
    head, prototypes, loss = SwaVProjectionHead(*widths), SwaVPrototypes(heads.dim, heads.prototypes), SwaVLoss()

    def step() -> Tensor:
        prototypes.normalize()
        scores = [prototypes(F.normalize(head(model(view)), dim=1, p=2)) for view in (*large, *small)]
        return loss(scores[: len(large)], scores[len(large) :])

    return nn.ModuleList([model, head, prototypes]), step


def stable_pretraining(
    method: str, model: nn.Module, large: list[Tensor], small: list[Tensor], heads: Heads = HEADS
) -> tuple[nn.Module, Step]:
    from stable_pretraining.methods.simclr import SimCLR
    from stable_pretraining.methods.swav import SwAV as StableSwAV

    widths = heads.hidden, heads.dim
    if method == "SimCLR":
        module = SimCLR(model, projector_dims=widths, temperature=heads.temperature)
        return module, lambda: module(*large).loss
    module = StableSwAV(model, projector_dims=widths, n_prototypes=heads.prototypes)
    return module, lambda: module(global_views=large, local_views=small).loss


def our_mae(model: nn.Module, images: Tensor, ratio: float) -> tuple[nn.Module, Step]:
    flow = MaskedViews(model, masking=Masking(ratio=ratio), decoder=partial(Decoder, normalize_target=False))
    batch = Batch(views=[images], seed=torch.arange(len(images), device=images.device))
    return flow, lambda: flow.total(flow.step(batch).terms)


def lightly_mae(model: nn.Module, images: Tensor, ratio: float, heads: Heads = HEADS) -> tuple[nn.Module, Step]:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    vit: Any = model.to(memory_format=torch.contiguous_format)  # its initialisation needs that
    encoder, size = MaskedVisionTransformerTIMM(vit=vit), vit.patch_embed.patch_size[0]
    width, depth = heads.decoder
    decoder: Any = MAEDecoderTIMM(
        vit.patch_embed.num_patches, size, embed_dim=vit.embed_dim, decoder_embed_dim=width, decoder_depth=depth,
        decoder_num_heads=width // 32,
    )  # fmt: skip

    def step() -> Tensor:
        shape = len(images), encoder.sequence_length
        keep, masked = utils.random_token_mask(size=shape, mask_ratio=ratio, device=images.device)
        encoded = decoder.embed(encoder.encode(images, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(decoder.mask_token, shape), keep, encoded)
        pred = decoder.predict(utils.get_at_index(decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, size), masked - 1)  # the class token comes first
        return F.mse_loss(pred, target)

    return nn.ModuleList([encoder, decoder]), step


LIBRARIES = {"ours": ours, "ours again": ours, "lightly": lightly, "stable-pretraining": stable_pretraining}


# Measuring -----------------------------------------------------------------------------------------------------------


def step_times(method: str, recipe: str, name: str, seconds: float) -> Times:
    """SimCLR or SwAV by every library."""
    size, large_sizes, small_sizes = RECIPES[recipe]
    generator = torch.Generator().manual_seed(0)
    large, small = (
        [torch.randn(size, 3, side, side, generator=generator) for side in sides]
        for sides in (large_sizes, small_sizes)
    )
    makes = {
        library: partial(make, method, trunk(name, large_sizes[0]), large, small) for library, make in LIBRARIES.items()
    }
    return measure(makes, seconds)


def mae_times(recipe: str, seconds: float) -> Times:
    """MAE on a ViT-S: ours twice, ours with one patch removed, lightly's."""
    size, (side, *_), _ = RECIPES[recipe]
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(0))

    def model() -> nn.Module:
        return backbone(BACKBONES["ViT-S"], image_size=side)

    one_patch = 0.5 / (side // 16) ** 2
    makes = {
        "ours": partial(our_mae, model(), images, 0.75),
        "ours again": partial(our_mae, model(), images, 0.75),
        "ours, nothing removed but one patch": partial(our_mae, model(), images, one_patch),
        "lightly": partial(lightly_mae, model(), images, 0.75),
    }
    return measure(makes, seconds)


def measure(makes: Mapping[str, Callable[[], Candidate]], seconds: float, device: torch.device = CPU) -> Times:
    """Each candidate's step in turn for about so long; the times of the first step are left out.

    On a GPU encoders are in bfloat16. What is not installed, or makes no step, is left out and named.
    """
    candidates: dict[str, Candidate] = {}
    for library, make in makes.items():
        torch.manual_seed(0)
        try:
            module, *work = make()
            candidate = module.to(device), *work
            _step(device, *candidate)  # memory is allocated before anything is measured
            candidates[library] = candidate
        except FAILURES as error:
            told = first_line(error)
            print(f"{library} is left out: {told}", file=sys.stderr, flush=True)
    times: Times = {library: [] for library in candidates}
    end, order = time.monotonic() + seconds, list(candidates)
    while time.monotonic() < end or len(times["ours"]) < 3:
        for library in order:
            times[library].append(_step(device, *candidates[library]))
        order.append(order.pop(0))
    return times


def head(title: str, module: str, *libraries: str) -> list[str]:
    """How a page of step times begins, up to the head of its table; the load is that of now."""
    return [
        f"# {title}",
        "",
        f"`{' '.join([f'python -m benchmarks.{module}', *sys.argv[1:]])}`; the load is that before.",
        "",
        hardware(*(libraries or ("torch", "timm", "lightly", "stable-pretraining"))),
        "",
        "| method | views | backbone | library | ms | ours / it | CPU ms | ours / it | steps |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]


def rows(first: str, times: Times) -> list[str]:
    """Lines of the table: the least time of each library, and ours over it."""
    best = {library: [min(column) for column in zip(*pairs, strict=True)] for library, pairs in times.items()}
    lines = []
    for library, (clock, cpu) in best.items():
        ratios = best["ours"][0] / clock, best["ours"][1] / cpu
        numbers = f"{1000 * clock:.0f} | {ratios[0]:.2f} | {1000 * cpu:.0f} | {ratios[1]:.2f}"
        lines.append(f"| {first} | {library} | {numbers} | {len(times[library])} |")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return lines


def _step(device: torch.device, module: nn.Module, forward: Step, *after: Callable[[], object]) -> tuple[float, float]:
    module.zero_grad()
    wait(device)
    clock, cpu = time.perf_counter(), time.process_time()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = forward().sum()
    loss.backward()
    for work in after:
        work()
    wait(device)
    return time.perf_counter() - clock, time.process_time() - cpu


def wait(device: torch.device) -> None:
    """Until everything that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def worker_rates(recipe: str, num: int) -> dict[str, list[float]]:
    """Pictures a second of one worker: ours, our colour half besides, lightly's; three rounds in turn."""
    from lightly.transforms.swav_transform import SwaVTransform

    _, large, small = RECIPES[recipe]
    source = Emoji("train")
    colour: dict[str, Any] = {"flip": 0.5, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    colour |= {"jitter_prob": 0.8, "gray_prob": 0.2, "blur_prob": 0.5, "blur_sigma": (0.1, 2.0)}
    views = {
        "large": View(large[0], (0.14, 1.0), count=len(large), **colour),
        "small": View(small[0], (0.05, 0.14), count=len(small), **colour),
    }
    mean, std = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
    sizes = {"batch_size": num, "eval_batch_size": num, "image_size": large[0]}
    data = DataModule(train=source, eval={}, views=views, seed=0, mean=mean, std=std, **sizes)
    loader: Any = data.train_dataloader()
    transform = SwaVTransform(crop_sizes=(large[0], small[0]), crop_counts=(len(large), len(small)))
    rates: dict[str, list[float]] = {"ours": [], "our colour half": [], "lightly": []}
    for places in islice(loader.batch_sampler, 3):
        start = time.perf_counter()
        batch = loader.dataset.__getitems__(places)
        rates["ours"].append(num / (time.perf_counter() - start))
        start = time.perf_counter()
        colour_views(batch["views"], batch["colour"], mean, std)
        rates["our colour half"].append(num / (time.perf_counter() - start))
        start = time.perf_counter()
        for row in batch_views(transform, source, batch["index"].tolist()):
            torch.stack(row)
        rates["lightly"].append(num / (time.perf_counter() - start))
    return rates


def batch_views(transform: Callable, source: Emoji, rows: list[int]) -> Iterator[tuple[Tensor, ...]]:
    """Views of a batch by lightly, one tuple a view, as its data loader would collate them."""
    yield from zip(*(transform(source.image(row)) for row in rows), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 at the smaller recipe, few steps")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--seconds", type=float, help="of measuring a case; default 180, quick 30")
    parser.add_argument("--only", choices=("SimCLR", "SwAV", "MAE"), help="one method, and nothing of the data side")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    seconds = args.seconds or (30 if args.quick else 180)
    few = 1 if args.quick else None
    lines = head("Step time of SimCLR, SwAV and MAE", "step_time")
    for recipe in islice(RECIPES, few):
        for shown, name in islice(BACKBONES.items(), few):
            for method in ("SimCLR", "SwAV"):
                if args.only not in (None, method):
                    continue
                views = recipe if method == "SwAV" else recipe.split(" + ")[0]
                first = f"{method} | {views}, batch {RECIPES[recipe][0]} | {shown}"
                lines += rows(first, step_times(method, recipe, name, seconds))
        view = recipe.split(" + ")[0].replace("2 x", "1 x")
        if args.only in (None, "MAE"):
            lines += rows(f"MAE | {view}, batch {RECIPES[recipe][0]} | ViT-S", mae_times(recipe, seconds))
    if args.only is None:
        lines += data_side(few, 16 if args.quick else 64)
    publish(lines, RESULTS if args.write else None)


def data_side(few: int | None, num: int) -> list[str]:
    """The table of what a worker hands over."""
    lines = ["", "Pictures of the embedded emoji (64 pixels) a second and worker, best of three:", ""]
    lines += ["| views | ours | our colour half | lightly | ours / lightly | with colour / lightly |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for recipe in islice(RECIPES, few):
        torch.set_num_threads(1)
        rates = {name: max(column) for name, column in worker_rates(recipe, num).items()}
        both = 1 / (1 / rates["ours"] + 1 / rates["our colour half"])
        lines.append(
            f"| {recipe} | {rates['ours']:.0f} | {rates['our colour half']:.0f} | {rates['lightly']:.0f} | "
            f"{rates['ours'] / rates['lightly']:.1f} | {both / rates['lightly']:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
