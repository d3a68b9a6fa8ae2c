"""What CLIP's loss and gradient lose with fewer digits in its products, and on a GPU what that gains.

Run from the root of the repository::

    python -m benchmarks.loss_precision            # N = 32,768; a quarter of an hour of two cores, or seconds of a GPU
    python -m benchmarks.loss_precision --quick    # N = 4,096
    python -m benchmarks.loss_precision --write    # also writes benchmarks/results/loss_precision.md

The scale is 100, CLIP's largest, and D = 512. Errors are against float64. On the CPU, which has neither TF32 nor sums
of bfloat16 products in float32, the factors of every product are rounded as a GPU rounds them, and multiplied in
float32; so the errors are a GPU's but for the order of sums, and no time is told.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import hardware, publish
from repr.losses.contrastive import clip
from repr.losses.precision import product_of_halves

RESULTS = Path(__file__).parents[1] / "benchmarks/results/loss_precision.md"
NUM, QUICK_NUM, DIM, CHUNK, SCALE = 32768, 4096, 512, 256, 100.0
PEER = "open_clip's loss under bfloat16 autocast"
PEER_NUM = 8192  # on the CPU its matrices of N x N do not fit beyond
STATES = {"at the start": 30.0, "trained": 5.0}  # noise in the texts beside what they share with their images


class Rounded(TorchDispatchMode):
    """Products of float32 matrices on the CPU as a GPU makes them of rounded factors."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply = multiply

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            product = self.multiply(*args)
            return kwargs["out"].copy_(product) if kwargs else product
        if func is torch.ops.aten.addmm_.default:
            return args[0].add_(self.multiply(*args[1:]))
        return func(*args, **kwargs)


def to_tf32(x: Tensor) -> Tensor:
    """To the nearest number with 10 bits behind the point."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


EMULATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tf32": lambda a, b: torch.mm(to_tf32(a), to_tf32(b)),
    "bf16x3": product_of_halves,
}


def features(num: int, noise: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    image, other = (torch.randn(num, DIM, generator=rng) for _ in range(2))
    return F.normalize(image), F.normalize(image + noise * other)


def backward(x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
    leaves = [x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves)
    return value.item(), torch.cat([grad.double() for grad in grads])


@contextmanager
def arithmetic(name: str, device: str) -> Iterator[None]:
    with Rounded(EMULATED[name]) if device == "cpu" and name in EMULATED else nullcontext():
        yield


def losses(device: str, num: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def ours(x: Tensor, y: Tensor, precision: Any) -> Tensor:
        return clip(x, y, logit_scale=SCALE, chunk_size=CHUNK, precision=precision)

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return ClipLoss()(x, y, torch.tensor(SCALE, device=device))

    found = {name: lambda x, y, name=name: ours(x, y, name) for name in ("float32", "tf32", "bf16x3")}
    return found | ({PEER: theirs} if device == "cuda" or num <= PEER_NUM else {})


def measured(num: int, device: str) -> Iterator[str]:
    yield "| features | products | loss | its error | error of the gradient | cosine of the gradient |" + (
        " ms | MiB |" if device == "cuda" else ""
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: |" + (" ---: | ---: |" if device == "cuda" else "")
    for state, noise in STATES.items():
        x, y = features(num, noise)
        exact, exact_grad = backward(
            *(z.double().to(device) for z in (x, y)), lambda a, b: clip(a, b, logit_scale=SCALE, chunk_size=CHUNK)
        )
        x, y = x.to(device), y.to(device)
        for name, loss in losses(device, num).items():
            with arithmetic(name, device):
                value, grad = backward(x, y, loss)
            error = ((grad - exact_grad).norm() / exact_grad.norm()).item()
            cosine = torch.cosine_similarity(grad.flatten(), exact_grad.flatten(), dim=0).item()
            cells = [state, name, f"{value:.6g}", f"{abs(value - exact):.1e}", f"{error:.1e}", f"{cosine:.7f}"]
            yield "| " + " | ".join(cells + (timed(x, y, loss) if device == "cuda" else [])) + " |"
            print(".", end="", file=sys.stderr, flush=True)


def timed(x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], repetitions: int = 10) -> list[str]:
    """Milliseconds of forward and backward on a GPU, the least of some, and what they hold at most."""
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
        loss(*leaves).backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    held = torch.cuda.max_memory_allocated() - before
    return [f"{1e3 * min(seconds):.2f}", f"{held / 2**20:.0f}"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"N = {QUICK_NUM:,}, not {NUM:,}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/loss_precision.md")
    args = parser.parse_args()
    num = QUICK_NUM if args.quick else NUM
    card = f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ", digits of a GPU emulated"
    lines = [
        "# Digits of a loss's products",
        "",
        f"CLIP's loss of N = {num:,}, D = {DIM}, scale {SCALE:g}, in chunks of {CHUNK} rows, against float64; error of "
        f"the gradient: length of the difference over the length. `python -m benchmarks.loss_precision"
        f"{' --quick' if args.quick else ''}`",
        "",
        f"{hardware('torch', 'open_clip_torch')}{card}",
        "",
        *measured(num, args.device),
    ]
    print(file=sys.stderr)
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
