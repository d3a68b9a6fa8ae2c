"""CLIP, SigLIP, CoCa: the step time of ours beside open_clip's own models and losses, and the memory of captions.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.image_text_step_time            # some fifteen minutes on two cores
    python -m benchmarks.image_text_step_time --quick    # three minutes
    python -m benchmarks.image_text_step_time --write    # also writes benchmarks/results/image_text_step_time.md

A step is forward, loss, backward of a batch that is ready, float32, measured as in :mod:`benchmarks.step_time`. Both
have the same towers: a ViT of six blocks 384 wide, on 96 pixels with patches of 16, and four layers of text, 384 wide,
with CLIP's 49,408 words; CoCa's have one pooler of 256 queries and four layers of decoder besides. Captions have 8 to
20 of their 76 places filled, as captions of COCO have, or all.

The memory of the caption loss is that of forward and backward in a process of its own: the peak of resident memory
above what the process held when the inputs were ready, which are what a decoder gives for 256 captions of 76 words, 512
wide, and the head. open_clip's takes whole logits, so of it a part of the captions is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.loss_memory import resident
from benchmarks.report import publish
from benchmarks.step_time import ROOT, Candidate, head, measure, rows
from repr.batch import Batch
from repr.losses.captioning import caption
from repr.losses.contrastive import sigmoid
from repr.models.backbone import backbone
from repr.objectives.captioner import Captioner
from repr.objectives.image_text import ImageText

RESULTS = ROOT / "benchmarks/results/image_text_step_time.md"
WORDS, LENGTH, WIDTH, HEADS, LAYERS, QUERIES = 49_408, 76, 384, 6, 4, 256
SIZE, PATCH, BLOCKS, BATCH = 96, 16, 6, 32
TEXT: dict[str, Any] = {"context_length": LENGTH, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
OUR_VIT: dict[str, Any] = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS}
THEIR_VIT = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": BLOCKS, "head_width": WIDTH // HEADS}
BIAS = -10.0  # SigLIP's
DIM, NUM, PART = 512, 256, 32  # of the measurement of memory; captions of open_clip's


def texts(num: int, shortest: int, longest: int) -> Tensor:
    """Captions of random words with start, end and padding: (num, 76)."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, WORDS - 2, (num, LENGTH), generator=rng)
    last = torch.randint(shortest - 1, longest, (num, 1), generator=rng)
    tokens[:, 0] = WORDS - 2
    tokens.scatter_(1, last, WORDS - 1)
    return tokens.masked_fill(torch.arange(LENGTH) > last, 0)


def our(flow: Any, images: Tensor, tokens: Tensor) -> Candidate:
    batch = Batch(views=[images], text=tokens)
    return flow, lambda: flow.total(flow.step(batch).terms)


def our_pairs(images: Tensor, tokens: Tensor, **options: Any) -> Candidate:
    """CLIP, or what the options make of it."""
    from open_clip.transformer import TextTransformer

    vit = backbone("vit_base_patch16_clip_224", image_size=SIZE, global_pool="token", **OUR_VIT)
    return our(ImageText(vit, TextTransformer(output_dim=WIDTH, **TEXT), **options), images, tokens)


def our_siglip(images: Tensor, tokens: Tensor) -> Candidate:
    return our_pairs(images, tokens, losses={"contrast": sigmoid}, temperature=0.1, logit_bias=BIAS)


def our_coca(images: Tensor, tokens: Tensor) -> Candidate:
    from open_clip.transformer import TextTransformer

    sizes: Any = {"global_pool": "avg", "final_norm": False, "fc_norm": False, **OUR_VIT}
    vit = backbone("vit_base_patch16_clip_224", image_size=SIZE, **sizes)
    text: Any = TextTransformer(output_dim=WIDTH, embed_cls=True, output_tokens=True, **TEXT)
    return our(Captioner(vit, text, pooler="shared", num_queries=QUERIES), images, tokens)


def open_clip_pairs(images: Tensor, tokens: Tensor, bias: float | None = None) -> Candidate:
    """Its CLIP with the loss of CLIP, or with a bias that of SigLIP."""
    from open_clip import CLIP, ClipLoss
    from open_clip.loss import SigLipLoss

    model: Any = CLIP(WIDTH, vision_cfg=THEIR_VIT, text_cfg=TEXT, init_logit_bias=bias)  # type: ignore[arg-type]
    loss: Any = ClipLoss() if bias is None else SigLipLoss()
    return model, lambda: loss(*model(images, tokens))


def open_clip_coca(images: Tensor, tokens: Tensor) -> Candidate:
    from open_clip import CoCa, CoCaLoss

    vision: Any = {"attentional_pool": True, "attn_pooler_queries": QUERIES, "output_tokens": True, **THEIR_VIT}
    text: Any = {"embed_cls": True, "output_tokens": True, **TEXT}
    decoder: Any = {"context_length": LENGTH, "vocab_size": WORDS, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    model: Any = CoCa(WIDTH, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    nn.init.normal_(model.text_decoder.text_projection, std=WIDTH**-0.5)  # which it leaves as found in memory
    loss = CoCaLoss(caption_loss_weight=2, clip_loss_weight=1)
    return model, lambda: torch.stack(loss(**model(images, tokens))).sum()


def memory(form: str, num: int) -> dict[str, float]:
    """Peak in MiB above the inputs, and seconds, of a caption loss; in this process."""
    rng = torch.Generator().manual_seed(0)

    def leaves(num: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(num, LENGTH, DIM, generator=rng)
        matrix = DIM**-0.5 * torch.randn(DIM, WORDS, generator=rng)
        return hidden.requires_grad_(), matrix.requires_grad_(), torch.randint(1, WORDS, (num, LENGTH), generator=rng)

    def loss(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        if form == "ours":
            return caption(hidden, matrix, targets, pad_id=0)
        return F.cross_entropy((hidden @ matrix).permute(0, 2, 1), targets, ignore_index=0)  # as CoCaLoss does

    loss(*leaves(1)).backward()  # threads are started
    inputs = leaves(num)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before, start = resident("VmRSS"), time.perf_counter()
    loss(*inputs).backward()
    return {"seconds": time.perf_counter() - start, "peak": resident("VmHWM") - before}


def memory_table(num: int) -> list[str]:
    lines = ["", "| caption loss | captions | MiB over the inputs | s |", "|---|---:|---:|---:|"]
    for form, some in (("ours", num), ("open_clip", PART)):
        command = [sys.executable, "-m", "benchmarks.image_text_step_time", "--child", form, str(some)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        lines.append(f"| {form} | {some} | {found['peak']:.0f} | {found['seconds']:.1f} |")
    return lines


METHODS = {
    "CLIP": (our_pairs, open_clip_pairs),
    "SigLIP": (our_siglip, partial(open_clip_pairs, bias=BIAS)),
    "CoCa": (our_coca, open_clip_coca),
}
CAPTIONS = (("8 to 20 words", 8, 20), (f"{LENGTH} words", LENGTH, LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and captions")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--seconds", type=float, help="of measuring a case; default 120, quick 15")
    parser.add_argument("--only", choices=METHODS, help="one method, and nothing of memory")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory(args.child[0], int(args.child[1]))))
        return
    lines = head(
        "CLIP, SigLIP, CoCa by ours and by open_clip", "image_text_step_time", "torch", "timm", "open-clip-torch"
    )
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for method in [args.only] if args.only else METHODS:
        mine, theirs = METHODS[method]
        for told, *some in CAPTIONS if method == "CoCa" else CAPTIONS[:1]:
            inputs = images, texts(BATCH, *some)
            makes = {"ours": partial(mine, *inputs), "ours again": partial(mine, *inputs)}
            makes["open_clip"] = partial(theirs, *inputs)
            first = f"{method}, {told} | 1 x {SIZE}, batch {BATCH} | ViT, {BLOCKS} blocks"
            lines += rows(first, measure(makes, args.seconds or (15 if args.quick else 120)))
    if not args.only:
        lines += memory_table(PART if args.quick else NUM)
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
