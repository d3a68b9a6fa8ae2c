"""The table of the planner: a column a way of running, from forecasts of a step (:mod:`repr.training.forecast`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from repr.config import ConfigError
from repr.training.forecast import BUCKETS, FEWEST, GATHERED, Planner

if TYPE_CHECKING:
    from rich.table import Table

GB = 1e9
RESERVE = 0.1  # of the memory
MICRO_BATCH, CHUNK_SIZE = 64, 1024  # of the columns in slices, where the config names none
KINDS = ("parameters", "buffers", "gradients", "optimizer", "half-precision weights", BUCKETS, GATHERED, "batch",
         "activations", "embeddings", "loss")  # fmt: skip
TITLES = {"": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}


def columns(cfg: DictConfig, gpus: int) -> dict[str, tuple[Planner, str]]:
    """The ways of running a config: title -> planner and strategy."""
    as_told = [f"{key}={cfg[key]}" for key in ("micro_batch", "chunk_size") if cfg.get(key)]
    sliced = cfg.copy()
    sliced.micro_batch = cfg.get("micro_batch") or MICRO_BATCH
    if "chunk_size" in cfg.objective:
        sliced.chunk_size = cfg.chunk_size or CHUNK_SIZE
    in_slices = [f"{key}={sliced[key]}" for key in ("micro_batch", "chunk_size") if sliced.get(key)]
    ways = {} if cfg.get("micro_batch") else {" ".join(as_told): Planner(cfg, gpus=gpus)}
    ways[" ".join(in_slices)] = Planner(sliced, gpus=gpus)
    return {
        f"{TITLES[strategy]}\n{title}".strip(): (planner, strategy)
        for title, planner in ways.items()
        for strategy in planner.shares
    }


def table(cfg: DictConfig, *, gpus: int, memory: float, bandwidth: float, tflops: float) -> Table:
    """What ``python -m repr.plan`` shows.

    Raises:
        ConfigError: not even the smallest batch fits.
    """
    from rich.table import Table

    rows, ways, budget = cfg.data.batch_size // gpus, columns(cfg, gpus), (1 - RESERVE) * memory * GB
    forecasts = [planner.at(rows)[strategy] for planner, strategy in ways.values()]
    most = [planner.largest(strategy, budget, rows) for planner, strategy in ways.values()]
    if not any(most):
        least = min((planner.at(FEWEST)[strategy] for planner, strategy in ways.values()), key=lambda f: f.total)
        held = sorted(least.memory.items(), key=lambda item: -item[1])[:2]
        largest = " and ".join(f"{num / GB:.3g} {kind}" for kind, num in held)
        fault = f"not even {FEWEST} samples a GPU fit into {budget / GB:.3g} of {memory:g} GB: a step takes "
        fault += f"{least.total / GB:.3g}, of these {largest}. Raise memory{'' if gpus > 1 else ' or gpus'}, "
        raise ConfigError([f"{fault}or make the model or the views smaller"])
    result = Table(title=f"{cfg.name}: {cfg.data.batch_size:,} samples a step, {rows:,} on each of {gpus:,} GPUs with "
                   f"{memory:g} GB, {cfg.trainer.precision}", title_justify="left")  # fmt: skip
    if any(planner.has_norm and planner.cfg.micro_batch for planner, _ in ways.values()):
        result.caption = "In slices BatchNorm has the statistics of a slice, so the gradient is another one."
        result.caption_justify = "left"
    result.add_column("GB a GPU, at the fullest moment")
    for title in ways:
        result.add_column(title, justify="right")
    for kind in (kind for kind in KINDS if any(f.memory.get(kind, 0) >= 5e6 for f in forecasts)):
        result.add_row(kind, *(_gb(f.memory.get(kind, 0)) for f in forecasts))
    result.add_section()
    result.add_row("together", *(_gb(f.total) for f in forecasts), style="bold")
    result.add_row("that moment is in", *(f.phase for f in forecasts))
    fits = [f"{f.total / memory / GB:.0%}" + ("" if f.total <= budget else ", too much") for f in forecasts]
    result.add_row(f"of {memory:g} GB", *fits)
    result.add_row("largest batch", *(f"{num * gpus:,}" if num else "none" for num in most), style="bold")
    if "chunk_size" in cfg.objective:
        result.add_section()
        share = [1e-9 * planner.loss_operations(rows) / tflops for planner, _ in ways.values()]
        result.add_row(f"ms of the loss's products at {tflops:g} TFLOP/s", *map(_ms, share))
        if gpus > 1:
            result.add_row("the same if each GPU made all of them", *(_ms(gpus * ms) for ms in share))
    if gpus > 1:
        result.add_section()
        result.add_row("[italic]GB a GPU sends in a step[/]")
        for what in dict.fromkeys(what for f in forecasts for what in f.sent):
            if any(f.sent.get(what, 0) >= 5e6 for f in forecasts):
                result.add_row(what, *(_gb(f.sent.get(what, 0)) for f in forecasts))
        seconds = (sum(f.sent.values()) / GB / bandwidth for f in forecasts)
        result.add_row(f"ms at {bandwidth:g} GB/s", *(f"{1e3 * s:.0f}" for s in seconds), style="bold")
    return result


def _ms(num: float) -> str:
    return f"{num:.0f}" if num >= 10 else f"{num:.2g}"


def _gb(num: float) -> str:
    return f"{num / GB:.2f}" if num >= 5e6 else ""
