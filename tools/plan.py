"""Predict what a training step costs in memory and traffic, and the largest batch that fits, without a GPU.

Run in the root of the repository, with what ``repr.fit`` takes, and the machine::

    python -m tools.plan experiment=clip_vit_b32 gpus=256 memory=80
    python -m tools.plan experiment=simclr_rn50 gpus=32 memory=40 data.batch_size=8192 bandwidth=25

``gpus`` is their number in all, ``memory`` what each has in GB (10^9 bytes), of which a tenth is left to CUDA's
context, workspaces and fragmentation, ``bandwidth`` what each sends in GB/s (50: a link of 400 Gbit/s), and ``tflops``
how many operations of float32 products it makes, in 10^12 a second (60), by which the time of a pairwise loss is told:
of a GPU's share, and of the whole, which each would compute without sharing. Batch sizes are those of all GPUs
together, as ``data.batch_size`` is. The step is traced without data (:mod:`repr.training.memory_trace`).
"""

from __future__ import annotations

import argparse
import difflib
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from repr.cli import one_line_errors
from repr.config import ConfigError, check, compose
from repr.training.forecast import BUCKETS, FEWEST, GATHERED, HALF, WHOLE, Planner

if TYPE_CHECKING:
    from rich.table import Table

GB = 1e9
RESERVE = 0.1  # of the memory
TFLOPS = 60.0
MICRO_BATCH, CHUNK_SIZE = 64, 1024  # of the columns in slices, where the config names none
KINDS = ("parameters", "buffers", "gradients", "optimizer", "half-precision weights", BUCKETS, GATHERED, "batch",
         "activations", "embeddings", "loss")  # fmt: skip
TITLES = {"": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}
OPTIONS = {"gpus": int, "memory": float, "bandwidth": float, "tflops": float}


def options_of(words: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Overrides of the config, and what is the planner's own.

    Raises:
        ConfigError: an own option is missing or no positive number.
    """
    given: dict[str, float] = {"bandwidth": 50.0, "tflops": TFLOPS}
    overrides, faults = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            overrides.append(word)
            continue
        try:
            given[key] = OPTIONS[key](value)
        except ValueError:
            given[key] = 0
        if not 0 < given[key] < math.inf:
            faults.append(f"{word}: set {key} to a {'whole ' if OPTIONS[key] is int else ''}number above 0")
    for key, example in {"gpus": "256", "memory": "80, in GB a GPU"}.items():
        if key not in given:
            faults.append(f"{key} has no value: set it, such as {key}={example}")
    if faults:
        raise ConfigError(faults)
    return overrides, given


def config(overrides: Sequence[str], gpus: int, config_dir: str | None = None) -> tuple[DictConfig, list[str]]:
    """The checked config of a run on so many GPUs, and what there is to say about it.

    Raises:
        ConfigError: it has faults, or what is planned depends on something that is not known here.
    """
    for word in overrides:
        key = word.partition("=")[0]
        if near := difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.75):
            raise ConfigError([f"there is no option '{key}'; did you mean '{near[0]}'?"])
    cfg = compose([*overrides, f"trainer.devices={gpus}", "trainer.num_nodes=1"], config_dir=config_dir)
    precision, notes = str(cfg.trainer.precision), []
    if precision not in {**HALF, **WHOLE}:
        raise ConfigError(
            [f"trainer.precision={precision} cannot be planned: set it to one of {', '.join({**HALF, **WHOLE})}"]
        )
    if cfg.get("scorer"):
        notes.append(f"scorer={cfg.scorer} is left out: the frozen scorer's weights and features come on top.")
        cfg.scorer = None
    if cfg.get("compile"):
        notes.append("compile=true is left out: what a compiler fuses is not held, so the forecast is rather too high.")
        cfg.compile = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(cfg)
    return cfg, notes + [str(warning.message) for warning in caught]


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


def table(cfg: DictConfig, *, gpus: int, memory: float, bandwidth: float, tflops: float = TFLOPS) -> Table:
    """What ``python -m tools.plan`` shows.

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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="gpus, memory, bandwidth, and as for repr.fit")
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")
    options = parser.parse_intermixed_args(arguments)
    with one_line_errors():
        overrides, given = options_of(options.words)
        gpus = int(given["gpus"])
        cfg, notes = config(overrides, gpus, options.config_dir)
        shown = table(cfg, gpus=gpus, memory=given["memory"], bandwidth=given["bandwidth"], tflops=given["tflops"])
    from rich.console import Console

    Console().print(shown)
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()
