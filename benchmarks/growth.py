"""How time and memory of a step grow with batch, views, prototypes, picture size and processes: ours and a peer's.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.growth            # some twenty minutes on two cores
    python -m benchmarks.growth --quick    # two sizes of batch and prototypes, at most three minutes
    python -m benchmarks.growth --write    # also writes benchmarks/results/growth.md

A step is forward, loss and backward of a batch that is ready, float32, with a small backbone, so that what a method
adds is seen; a teacher's update is a part of it. CLIP is ours with ``micro_batch`` and ``chunk_size`` of 256 beside
open_clip's loss on the same towers, on several processes with ``local_loss`` and ``gather_with_grad``; SwAV, MAE and
DINO are lightly's. Each size of each is measured in processes of its own. Seconds are the least of several steps by the
clock; on several processes, which share the cores, those of CPU of the process with the most. Memory is the peak of
what a process has resident in a step before, above what it held before it, malloc giving back what is freed, which
costs time and is set back then. A process gets 2 GiB for it, or ``--gigabytes``; one that needs more fails, which is
told.

An exponent is the slope of a line through the logarithms: 1 is in proportion, 2 is as the square.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

from benchmarks.large_batch import GIVES_BACK
from benchmarks.loss_memory import resident
from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/growth.md"
OURS, GIGABYTES = "ours", 2.0
KEEPS = {-3: 2**25, -1: 2**26}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, to which glibc raises them by itself


class Growth(NamedTuple):
    """One number that grows while the others stay."""

    method: str
    peer: str
    option: str  # which number
    values: list[int]
    others: dict[str, int]


GROWTHS = [
    Growth("CLIP", "open_clip", "batch", [1024, 2048, 4096], {"size": 32}),
    Growth("CLIP", "open_clip", "size", [64, 128, 256], {"batch": 16}),
    Growth("CLIP", "open_clip", "processes", [1, 2, 4], {"batch": 2048, "size": 32}),
    Growth("SwAV", "lightly", "batch", [32, 64, 128], {"views": 6, "size": 64, "prototypes": 3000}),
    Growth("SwAV", "lightly", "views", [4, 8, 16], {"batch": 16, "size": 64, "prototypes": 3000}),
    Growth("SwAV", "lightly", "prototypes", [12000, 48000, 192000], {"batch": 64, "views": 2, "size": 64}),
    Growth("MAE", "lightly", "batch", [16, 32, 64], {"size": 96}),
    Growth("MAE", "lightly", "size", [128, 256, 512], {"batch": 4}),
    Growth("DINO", "lightly", "batch", [32, 64, 128], {"views": 6, "size": 64, "prototypes": 4096}),
    Growth("DINO", "lightly", "views", [4, 8, 16], {"batch": 16, "size": 64, "prototypes": 4096}),
    Growth("DINO", "lightly", "prototypes", [16384, 65536, 262144], {"batch": 32, "views": 2, "size": 64}),
]


# One measurement, in its own processes -------------------------------------------------------------------------------


def candidate(method: str, library: str, sizes: dict[str, int]) -> Any:
    """A module, its step, and what comes after backward."""
    import torch

    from benchmarks.step_time import HEADS, lightly, lightly_mae, our_mae, ours
    from benchmarks.teacher_step_time import HEADS as TEACHER_HEADS
    from benchmarks.teacher_step_time import lightly_dino, our_dino
    from repr.models.backbone import backbone

    torch.manual_seed(0)
    if method == "CLIP":
        return clip(library, **sizes)
    batch, size, num_views = sizes["batch"], sizes["size"], sizes.get("views", 1)
    views = [torch.randn(batch, 3, *2 * [size if i < 2 else size // 2]) for i in range(num_views)]
    if method == "MAE":
        model = backbone("test_vit", image_size=size)
        return (our_mae if library == OURS else lightly_mae)(model, views[0], 0.75)
    model, large, small = backbone("test_resnet"), views[:2], views[2:]
    if method == "DINO":
        heads = TEACHER_HEADS._replace(prototypes=sizes["prototypes"])
        return (our_dino if library == OURS else lightly_dino)(model, large, small, heads)
    heads = HEADS._replace(prototypes=sizes["prototypes"])
    return (ours if library == OURS else lightly)("SwAV", model, large, small, heads)


def clip(library: str, *, batch: int, size: int, processes: int = 1) -> Any:
    """CLIP on this process's rows."""
    import torch
    from open_clip.loss import ClipLoss
    from open_clip.transformer import TextTransformer
    from torch.nn import functional as F  # noqa: N812

    from benchmarks.large_batch import CHUNK_SIZE, MICRO_BATCH, TEXT, VIT
    from repr.batch import Batch
    from repr.distributed import rank
    from repr.models.backbone import backbone
    from repr.models.slicing import slice_encoders
    from repr.objectives.image_text import ImageText

    towers = backbone("vit_tiny_patch16_224", **VIT | {"image_size": size}), TextTransformer(**TEXT)
    flow = ImageText(*towers, chunk_size=CHUNK_SIZE if library == OURS else None)
    rows = batch // processes
    text = torch.randint(1, 49000, (rows, TEXT["context_length"]))
    text[:, -1] = 49407  # the end token, at which the tower pools
    inputs = Batch(views=[torch.randn(rows, 3, size, size)], text=text)
    if library == OURS:
        slice_encoders(flow, MICRO_BATCH)
        return flow, lambda: flow.total(flow.step(inputs).terms)
    criterion = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=processes)

    def step() -> torch.Tensor:
        image, words = flow.encode_image(inputs["views"][0]), flow.encode_text(inputs["text"])
        return criterion(F.normalize(image, dim=-1), F.normalize(words, dim=-1), flow.logit_scale.exp())

    return flow, step


def point(options: dict[str, Any]) -> dict[str, float]:
    """Seconds and MiB of this process's step."""
    import torch

    sizes = options["sizes"]
    world, number = sizes.get("processes", 1), int(os.environ.get("RANK", 0))
    if "processes" in sizes:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=number, world_size=world)
    module, step, *after = candidate(options["method"], options["library"], sizes)

    def whole() -> tuple[float, float]:
        module.zero_grad()
        clock, cpu = time.perf_counter(), time.process_time()
        step().backward()
        for work in after:
            work()
        return time.perf_counter() - clock, time.process_time() - cpu

    data = resident("VmData") * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (int(data + options["gigabytes"] * 2**30), resource.RLIM_INFINITY))
    whole()  # code is loaded and threads are started before anything is measured
    module.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start = resident("VmRSS")
    whole()
    peak, malloc = resident("VmHWM") - start, ctypes.CDLL(None)
    for option, size in KEEPS.items():
        malloc.mallopt(option, size)
    whole()
    times, end = [whole(), whole()], time.monotonic() + options["seconds"]
    while time.monotonic() < end and "processes" not in sizes:  # processes make as many steps
        times.append(whole())
    clock, cpu = (min(column) for column in zip(*times, strict=True))
    return {"seconds": cpu if "processes" in sizes else clock, "MiB": peak}


def measured(growth: Growth, library: str, value: int, args: argparse.Namespace) -> dict[str, float] | str:
    """Seconds and MiB of a size, of the process with the most; or why there are none."""
    sizes = growth.others | {growth.option: value}
    options = {"method": growth.method, "library": library, "sizes": sizes}
    options |= {"seconds": 1, "gigabytes": args.gigabytes}
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(options)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **GIVES_BACK}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    runs = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(number)}, **pipes)
        for number in range(sizes.get("processes", 1))
    ]
    outputs = [run.communicate() for run in runs]
    for run, (_, error) in zip(runs, outputs, strict=True):
        if run.returncode:
            memory = any(word in error for word in ("not enough memory", "MemoryError", "can't allocate", "bad_alloc"))
            return f"more than {args.gigabytes:g} GiB" if memory else error.strip().splitlines()[-1]
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    return {key: max(one[key] for one in found) for key in found[0]}


# The tables ----------------------------------------------------------------------------------------------------------


def exponent(values: Sequence[int], numbers: Sequence[float]) -> str:
    """The slope of a line through the logarithms, of two points or more."""
    points = [(math.log(v), math.log(n)) for v, n in zip(values, numbers, strict=True) if n > 0]
    return f"{linear_regression(*zip(*points, strict=True)).slope:.2f}" if len(points) > 1 else ""


def lines_of(growth: Growth, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Rows of the table of exponents, and those of the table of sizes, of ours and of the peer's."""
    values = growth.values[:2] if args.quick else growth.values
    others = ", ".join(f"{name} {number}" for name, number in growth.others.items())
    fitted, sizes = [], []
    for library in (OURS, growth.peer):
        found: dict[int, dict[str, float]] = {}
        end = ""
        for value in values:
            result = measured(growth, library, value, args)
            if isinstance(result, str):
                end = f"{value}: {result}"
                break
            found[value] = result
        slopes = [exponent(list(found), [one[key] for one in found.values()]) for key in ("seconds", "MiB")]
        fitted.append(f"| {growth.method} | {growth.option} | {library} | {' | '.join(slopes)} | {end} |")
        cells = [f"{one['seconds']:.2f} s, {one['MiB']:.0f} MiB" for one in found.values()]
        cells += [""] * (len(growth.values) - len(cells))
        told = f"{growth.option} {', '.join(map(str, values))}; {others}"
        sizes.append(f"| {growth.method} | {told} | {library} | {' | '.join(cells)} |")
        print(fitted[-1], sizes[-1], sep="\n", file=sys.stderr, flush=True)
    return fitted, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, of batch and prototypes")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--only", help="one method")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="that a step may take")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(json.loads(args.point))))
        return
    lines = [
        "# How a step grows",
        "",
        f"`{' '.join(['python -m benchmarks.growth', *sys.argv[1:]])}`; the load is that before.",
        "",
        hardware("torch", "timm", "open_clip_torch", "lightly"),
        "",
    ]
    growths = [growth for growth in GROWTHS if not args.quick or growth.option in ("batch", "prototypes")]
    rows = [lines_of(growth, args) for growth in growths if args.only in (None, growth.method)]
    lines += ["Exponents; 1 is in proportion, 2 is as the square:", ""]
    lines += ["| method | grows | library | of time | of memory | fails at |", "|---|---|---|---:|---:|---|"]
    lines += [line for fitted, _ in rows for line in fitted]
    lines += ["", "Each size:", "", "| method | sizes | library | first | second | third |"]
    lines += ["|---|---|---|---:|---:|---:|", *(line for _, sizes in rows for line in sizes)]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
