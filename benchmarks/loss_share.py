"""What a loss of the global batch costs each of W processes: multiplications, traffic, memory and time.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.loss_share            # some 15 minutes on two cores
    python -m benchmarks.loss_share --quick    # a minute or two: memory at N = 8,192
    python -m benchmarks.loss_share --write    # also writes benchmarks/results/loss_share.md

Processes are real ones that talk over gloo, each with one thread and N / W rows. Multiplications are those that
torch's ``FlopCounterMode`` counts, forward and backward, of the process with the most; traffic is what a process sends
by the collectives that ran, as on a ring: of W processes' data (W - 1) / W to gather or scatter it, twice that to sum
it everywhere. open_clip's loss has ``local_loss`` and ``gather_with_grad``, the flags with which it is exact. Memory is
the peak of resident memory above what the process held when its inputs were ready, malloc giving back what is freed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.large_batch import GIVES_BACK
from benchmarks.loss_memory import resident
from benchmarks.report import hardware, publish

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/loss_share.md"
WORLDS = (1, 2, 4, 8)
COUNTED = (2048, 128, 64)  # N, D, chunk_size of what is only counted
TIMED, LARGE, QUICK_LARGE, DIM = 8192, 65536, 8192, 512
CHUNK, SMALL_CHUNK = 32, 8  # rows of a chunk where time counts, and where memory does
SCALE, BIAS, TEMPERATURE = 14.3, -10.0, 0.1
THEIRS = "open_clip's clip"
GATHERED, PASSED = (f"clip, chunks of {SMALL_CHUNK} rows, {way}" for way in ("gathered", "a ring"))
SENT_TWICE = ("allreduce_", "reduce_")  # to sum up and to send round


def losses(num: int, chunk: int | None, exchange: str = "gather") -> dict[str, Callable[..., Tensor]]:
    """Functions of (x, y, scale), of this process's rows; open_clip's under its own name."""
    import torch
    from open_clip.loss import ClipLoss
    from torch.nn import functional as F  # noqa: N812

    from repr.distributed import rank, world_size
    from repr.losses import contrastive, decorrelation, hypersphere, mixup
    from repr.losses.exchange import exchange_of

    passing = exchange_of(exchange, ["clip"])
    both: dict[str, Any] = {"chunk_size": chunk, "exchange": passing}
    draw = {"perm": torch.arange(num).roll(1), "lam": torch.full((num,), 0.7)}
    theirs = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())
    return {
        "clip": lambda x, y, s: contrastive.clip(x, y, logit_scale=s, **both),
        THEIRS: lambda x, y, s: theirs(F.normalize(x), F.normalize(y), s),
        "sigmoid": lambda x, y, s: contrastive.sigmoid(x, y, logit_scale=s, logit_bias=BIAS, **both),
        "nt_xent": lambda x, y, s: contrastive.nt_xent(x, y, temperature=TEMPERATURE, **both),
        "uniformity": lambda x, y, s: hypersphere.uniformity(x, **both),
        "cross_uniformity": lambda x, y, s: hypersphere.cross_uniformity(x, y, **both),
        "mixed_contrast": lambda x, y, s: mixup.mixed_contrast(x, y, **draw, **both),
        "soft_clip": lambda x, y, s: mixup.soft_clip(x, y, **both),
        "covariance": lambda x, y, s: decorrelation.covariance(x, exchange=passing),
        "cross_correlation": lambda x, y, s: decorrelation.cross_correlation(x, y, exchange=passing),
    }


# One process ---------------------------------------------------------------------------------------------------------


def inputs(num: int, dim: int) -> list[Tensor]:
    """This process's rows of N, and a scale; all processes have the same true pairs to find."""
    import torch

    from repr.distributed import rank, world_size

    rng = torch.Generator().manual_seed(rank())
    x, y = (torch.randn(num // world_size(), dim, generator=rng) for _ in range(2))
    y.add_(x)
    return [x.requires_grad_(), y.requires_grad_(), torch.tensor(SCALE, requires_grad=True)]


def counted() -> dict[str, Any]:
    """Of every loss, plain and in chunks, multiplications (a product and a sum each), and bytes sent."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    from repr.distributed import world_size

    class Traffic(TorchDispatchMode):
        sent = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                name = func._schema.name.removeprefix("c10d::")
                sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, torch.Tensor)) for arg in args]
                share = (world_size() - 1) / world_size()
                self.sent += share * max(sizes) * (2 if name in SENT_TWICE else 1)
            return func(*args, **(kwargs or {}))

    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # which the counter does not know
    num, dim, chunk = COUNTED
    found = {}
    for form, size in (("plain", None), ("chunks", chunk)):
        for name, loss in losses(num, size).items():
            leaves = inputs(num, dim)
            with FlopCounterMode(display=False, custom_mapping=in_place) as flops, Traffic() as traffic:
                loss(*leaves).backward()
            found[f"{name}, {form}"] = flops.get_total_flops() / 2, traffic.sent
    return found


def measured(name: str, num: int, chunk: int | None, repetitions: int, exchange: str = "gather") -> dict[str, float]:
    """Seconds and peak of memory of a loss on this process."""
    import torch.distributed as dist

    loss = losses(num, chunk, exchange)[name]
    losses(256, chunk, exchange)[name](*inputs(256, DIM)).backward()  # code is loaded before anything is measured
    leaves, seconds = inputs(num, DIM), []
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start = resident("VmRSS")
    for _ in range(repetitions):
        for leaf in leaves:
            leaf.grad = None
        dist.barrier()
        begin = time.perf_counter()
        value = loss(*leaves)
        value.backward()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds), "peak": resident("VmHWM") - start, "value": value.item()}


def child(rank: int, world: int, port: int, work: str, arguments: list[Any]) -> None:
    """A process of a group, which prints what it has found."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    print(json.dumps({"counted": counted, "measured": measured}[work](*arguments)))
    dist.destroy_process_group()


# All measurements ----------------------------------------------------------------------------------------------------


def group(world: int, work: str, *arguments: Any) -> list[Any]:
    """What ``work`` gives on each of so many fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore::FutureWarning", "-m", "benchmarks.loss_share", "--child"]
    children = [
        subprocess.Popen(
            [*command, json.dumps([rank, world, port, work, arguments])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | GIVES_BACK,
        )
        for rank in range(world)
    ]
    told = [process.communicate()[0] for process in children]
    return [json.loads(text.splitlines()[-1]) for text in told]


def work_and_traffic() -> list[str]:
    """The table of counts, and whether the target is met."""
    num, dim, chunk = COUNTED
    found = {}
    for world in WORLDS:
        ranks = group(world, "counted")
        found[world] = {name: [max(r[name][i] for r in ranks) for i in range(2)] for name in ranks[0]}
        print(".", end="", file=sys.stderr, flush=True)
    square = num * num * dim
    lines = [
        f"Multiplications of a process over N^2 D, and what it sends over N D numbers of 4 bytes, at N = {num}, "
        f"D = {dim}, chunks of {chunk} rows:",
        "",
        "| loss | " + " | ".join(f"W = {world}" for world in WORLDS) + " | 8 / 1 | "
        + " | ".join(f"sent, {world}" for world in WORLDS[1:]) + " |",
        f"| --- |{' ---: |' * (2 * len(WORLDS))}",
    ]  # fmt: skip
    shares = {}
    for name in found[1]:
        work = [found[world][name][0] for world in WORLDS]
        shares[name] = work[-1] / work[0]
        sent = [f"{found[world][name][1] / (4 * num * dim):.2f}" for world in WORLDS[1:]]
        cells = [*(f"{w / square:.3f}" for w in work), f"{shares[name]:.3f}", *sent]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    worst = max((name for name in shares if not name.startswith(THEIRS)), key=lambda name: shares[name])
    met = "met" if shares[worst] <= 0.14 else "MISSED"
    return [*lines, "", f"Target (W = 8 has at most .14 of the work of W = 1): {shares[worst]:.3f}, {worst}: {met}."]


def time_and_memory(large: int) -> list[str]:
    """Two processes beside open_clip's loss, and four with a large batch."""
    lines = [
        "| loss | W | N | s | peak MiB a process | value |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    seconds, peaks = {}, {}
    for title, name, world, num, *options in (
        ("clip, plain", "clip", 2, TIMED, None, 3),
        (f"clip, chunks of {CHUNK} rows", "clip", 2, TIMED, CHUNK, 3),
        (THEIRS, THEIRS, 2, TIMED, None, 3),
        (GATHERED, "clip", 4, large, SMALL_CHUNK, 1),
        (PASSED, "clip", 4, large, SMALL_CHUNK, 1, "ring"),
    ):
        ranks = group(world, "measured", name, num, *options)
        seconds[title] = max(rank["seconds"] for rank in ranks)
        peaks[title] = max(rank["peak"] for rank in ranks)
        value = sum(rank["value"] for rank in ranks) / world
        lines.append(f"| {title} | {world} | {num} | {seconds[title]:.2f} | {peaks[title]:.0f} | {value:.5g} |")
        print(".", end="", file=sys.stderr, flush=True)
    rows = large // 4 * DIM * 4 / 2**20  # of one modality of a process
    ratio = seconds["clip, plain"] / seconds[THEIRS]
    lines += [
        "",
        f"Target (two processes, N = {TIMED}: no more time than {THEIRS}): {ratio:.2f} x: "
        f"{'met' if ratio <= 1 else 'MISSED'}.",
    ]
    for title, held, which in ((GATHERED, 4 * rows, "gathered"), (PASSED, 0, "own")):
        over = peaks[title] - held
        lines.append(
            f"Target (four processes, N = {large}, {title}: less than 80 MiB over the {which} rows): {over:.0f} MiB: "
            f"{'met' if over < 80 else 'MISSED'}. {2 * rows:.0f} of them are the gradients of the own rows."
        )
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"memory at N = {QUICK_LARGE}, not {LARGE}")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--counts", action="store_true", help="no memory and no time, which a busy machine changes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    load = os.getloadavg()[0]
    command = " ".join(["python -m benchmarks.loss_share", *sys.argv[1:]])
    lines = [
        "# What a loss costs each process",
        "",
        f"Forward and backward, float32, gloo, one thread a process. `{command}`",
        "",
        f"{hardware('torch', 'open_clip_torch')}, load before {load:.1f}",
        "",
        *work_and_traffic(),
    ]
    if not args.counts:
        lines += ["", *time_and_memory(QUICK_LARGE if args.quick else LARGE)]
    print(file=sys.stderr)
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
