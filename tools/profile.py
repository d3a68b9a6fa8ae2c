"""Where the time of a training step goes, as a table and a trace.

Run in the root of the repository, with what ``repr.fit`` takes::

    python -m tools.profile experiment=simclr_emoji
    python -m tools.profile experiment=clip_vit_b32 trainer=gpu --steps 20 --trace trace.json

It trains some steps as ``repr.fit`` does, without evaluation and checkpoints, in a folder that is removed again. The
first table has the phases of a step by the clock, load to optimizer, of steps that nothing else disturbs; ``rest`` is
what lies between them: Lightning's loop, hooks and logging. The second one is of as many further steps under torch's
profiler, which slows them down: the operations that take most of the time, by themselves. ``--trace`` keeps what it
saw, for Perfetto or ``chrome://tracing``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from repr.cli import one_line_errors
from repr.config import compose
from repr.fit import train
from repr.runs.inputs import check_inputs
from repr.training.throughput import Phases

WARM_UP = 3  # steps in which workers start and kernels are chosen
NUM_OPERATIONS = 15


class Profile(pl.Callback):
    """Measure the phases of some steps, then look at as many through torch's profiler.

    Args:
        steps: of each of the two.

    Attributes:
        seconds: phase -> seconds of all steps; empty before they are made.
        operations: torch's profiler, which has stopped once ``is_done``.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.begin, self.is_done = steps, 0.0, False
        self.seconds: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the sections of a step."""
        device = trainer.strategy.root_device
        self.phases = Phases(device)
        trainer.profiler = self.phases  # type: ignore[attr-defined]
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.operations = profile(activities=kinds)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin or end a measurement between two batches."""
        batches = trainer.fit_loop.total_batch_idx + 1
        if batches == WARM_UP:
            self.begin, self.phases.seconds = self.phases.now(), dict.fromkeys(Phases.NAMES, 0.0)
        elif batches == WARM_UP + self.steps:
            seconds, total = self.phases.seconds or {}, self.phases.now() - self.begin
            self.seconds = {**seconds, "rest": total - sum(seconds.values())}
            self.phases.seconds = None
            self.operations.start()
        elif batches == WARM_UP + 2 * self.steps:
            self.operations.stop()
            trainer.should_stop = self.is_done = True

    def tables(self) -> list[Table]:
        """The two tables."""
        total = sum(self.seconds.values())
        phases = Table(title=f"a step: {1e3 * total / self.steps:.4g} ms", title_justify="left")
        phases.add_column("phase")
        phases.add_column("ms a step", justify="right")
        phases.add_column("share", justify="right")
        for name, seconds in self.seconds.items():
            phases.add_row(name, f"{1e3 * seconds / self.steps:.4g}", f"{seconds / total:.1%}")
        operations = Table(title="operations, by the time that they take themselves", title_justify="left")
        operations.add_column("operation", overflow="fold")
        for title in ("ms a step", "share", "calls a step"):
            operations.add_column(title, justify="right")
        times = [(_own_time(event), event.count, event.key) for event in self.operations.key_averages()]
        total = sum(time for time, _, _ in times)
        for time, count, name in sorted(times, reverse=True)[:NUM_OPERATIONS]:
            operations.add_row(
                name, f"{1e-3 * time / self.steps:.4g}", f"{time / total:.1%}", f"{count / self.steps:g}"
            )
        return [phases, operations]


def _own_time(event: Any) -> float:
    """Microseconds that an operation takes without those that it calls, on the GPU where there is one."""
    return float(event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for repr.fit")
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")
    parser.add_argument("--steps", type=int, default=10, help="of each of the two measurements")
    parser.add_argument("--trace", type=Path, help="a file for what torch's profiler saw (.json or .json.gz)")
    options = parser.parse_intermixed_args(arguments)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        if options.steps < 1:
            raise ValueError(f"--steps {options.steps}: set it to 1 or more")
        cfg = compose([*options.overrides, f"run_folder={folder}/run"], config_dir=options.config_dir)
        with open_dict(cfg):
            cfg.logger, cfg.data.eval, cfg.trainer.limit_val_batches = {}, {}, 0
            cfg.callbacks = {"profile": {"_target_": "tools.profile.Profile", "steps": options.steps}}
        check_inputs(cfg)
        trainer = train(cfg).trainer
        (seen,) = (callback for callback in trainer.callbacks if type(callback).__name__ == Profile.__name__)
        if not seen.is_done:
            needed = WARM_UP + 2 * options.steps
            raise ValueError(f"the run has fewer than {needed} batches: lower --steps, or raise trainer.max_epochs")
        for table in seen.tables():
            Console().print(table)
        if options.trace:
            seen.operations.export_chrome_trace(str(options.trace))
            print(f"trace: {options.trace}")


if __name__ == "__main__":
    main()
