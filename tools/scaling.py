"""What a step of each objective costs on 256 GPUs, from the planner: the tables of docs/scaling.md.

Run in the root of the repository; it takes some minutes and no GPU::

    python -m tools.scaling            # prints the tables
    python -m tools.scaling --write    # puts them into docs/scaling.md
    python -m tools.scaling clip swav  # of these objectives alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from repr.cli import one_line_errors
from repr.config import CONF, ConfigError, nearest
from repr.plan.__main__ import TFLOPS, config
from repr.plan.table import CHUNK_SIZE, GB, MICRO_BATCH
from repr.training.forecast import Planner

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
START, END = "<!-- from python -m tools.scaling -->", "<!-- to here -->"
GPUS, SMALL, LARGE, BANDWIDTH = 256, 32768, 163840, 50.0
# ViT-B/16 at 224 pixels, CLIP's text tower, AdamW and bf16-mixed for all.
COMMON = [
    "image_size=224", "small_size=96", "embed_dim=512", "backbone=vit_b16", "text=clip_base",
    "trainer.precision=bf16-mixed", f"data.batch_size={LARGE}",
]  # fmt: skip
PATCHES = ["+backbone.global_pool=avg", "+backbone.fc_norm=false"]  # pooled, so that patches are trained
# What their queues keep fits whole batches alone, and the planner looks at parts of them.
LEFT_OUT = ("densecl", "mocov2", "obow")
ANY_SIZE = ["+backbone.dynamic_img_size=true"]  # for small views
OWN = {
    **{name: ["embed_dim=768"] for name in ("m3col", "m3col_clip", "m3col_no_contrast", "m3col_no_heads")},
    "coca": ["text=coca_base"],
    **{name: [*ANY_SIZE, "text=coca_base"] for name in ("coca_dino", "siglip2")},
    "tips": [*ANY_SIZE, "+backbone.reg_tokens=1", "data.num_texts=2"],
    "cappa": ["text=coca_base", "text.embed_cls=false", "text.output_dim=null"],
    **dict.fromkeys(("swav", "dino", "ibot", "dinov2"), ANY_SIZE),
    **dict.fromkeys(("pixpro", "pixcontrast", "mae", "cmae", "mae_clip", "mae_clip_tgm"), PATCHES),
    **{name: [*PATCHES, "text=reader_base"] for name in ("voltron_cond", "voltron_dual")},
    "albef": ["text=reader_base", "objective.queue_length=0"],
}


def rows(name: str, overrides: Sequence[str] = (), title: str = "") -> tuple[list[str], list[str]]:
    """A row of the table of memory, and one of that of traffic."""
    title = title or name
    cfg, _ = config([*COMMON, f"objective={name}", *OWN.get(name, []), *overrides], GPUS)
    chunks, plain = "chunk_size" in cfg.objective, 0.0
    if chunks:
        plain = Planner(cfg, gpus=GPUS).at(LARGE // GPUS)["ddp"].memory.get("loss", 0)
        cfg.chunk_size = CHUNK_SIZE
    whole, in_slices = Planner(cfg, gpus=GPUS), cfg.copy()
    in_slices.micro_batch = MICRO_BATCH
    sliced = Planner(in_slices, gpus=GPUS)
    small, large, cut = whole.at(SMALL // GPUS), whole.at(LARGE // GPUS), sliced.at(LARGE // GPUS)
    least = cut["fsdp2"].memory
    totals = [f[s].total for f in (small, large, cut) for s in ("ddp", "fsdp2")]
    parts = [least.get("batch", 0), least.get("embeddings", 0) + least.get("loss", 0)]
    memory = [title, f"{whole.trained / 4e6:.0f}", *(f"{max(num, 0) / GB:.1f}" for num in (*totals, *parts))]
    memory.append(f"{plain / GB:.0f}" if plain > 1e6 else "")
    sent = [large["ddp"].sent, large["fsdp2"].sent, cut["fsdp2"].sent]
    flow = sum(num for what, num in sent[0].items() if what not in ("gradients", "buffers"))
    weights = [sum(f.get(what, 0) for what in ("gradients", "weights", "buffers")) for f in sent]
    seconds = [sum(f.values()) / GB / BANDWIDTH for f in sent]
    traffic = [title, f"{flow / GB:.2f}", *(f"{num / GB:.1f}" for num in weights), *(f"{1e3 * s:.0f}" for s in seconds)]
    if chunks:
        share = 1e-9 * whole.loss_operations(LARGE // GPUS) / TFLOPS
        traffic += [f"{share:.2g}", f"{GPUS * share:,.0f}"]
    return memory, traffic


def tables(names: Sequence[str]) -> list[str]:
    """Both tables as Markdown."""
    memory, traffic = [], []
    for name in names:
        options = [("", [])]
        if name == "swav":
            options.append((f"swav, queue of {LARGE:,}", [f"objective.queue_length={LARGE}"]))
        for title, overrides in options:
            first, second = rows(name, overrides, title)
            memory.append(first)
            traffic.append(second)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    heads = ["objective", "M trained", "32k, DDP", "FSDP2", "160k, DDP", "FSDP2", "160k in slices, DDP", "FSDP2",
             "of it batch", "embeddings and loss", "loss without chunks"]  # fmt: skip
    sent = [
        "objective",
        "embeddings",
        "weights, DDP",
        "FSDP2",
        "FSDP2 in slices",
        "ms, DDP",
        "FSDP2",
        "FSDP2 in slices",
        "ms of the loss, its share",
        "the whole",
    ]
    return [
        f"Memory in GB a GPU, at the fullest moment of a step, on {GPUS} GPUs:",
        "",
        *_markdown(heads, memory),
        "",
        f"Traffic at a batch of {LARGE:,}: GB that a GPU sends in a step, and what that takes at {BANDWIDTH:g} GB/s; "
        f"then the products of a pairwise loss at {TFLOPS:g} TFLOP/s, of a GPU's share and of the whole, which each "
        "would compute without sharing:",
        "",
        *_markdown(sent, traffic),
    ]


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [[*line, *[""] * (len(heads) - len(line))] for line in lines]
    marks = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, marks, *rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    known = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        prog="python -m tools.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "objectives", nargs="*", metavar="OBJECTIVE", help=f"all but {', '.join(LEFT_OUT)}, unless some are named"
    )
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if unknown := [name for name in options.objectives if name not in known]:
            raise ConfigError([f"there is no objective '{unknown[0]}'; {nearest(unknown[0], known)}"])
        lines = "\n".join(tables(options.objectives or [name for name in known if name not in LEFT_OUT]))
    print(lines)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        PAGE.write_text(f"{before}{START}\n\n{lines}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
