"""What our Trainer adds to a step, and how long it is from the command to the end of the first step.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.overhead            # some ten minutes on two cores
    python -m benchmarks.overhead --quick    # less than three
    python -m benchmarks.overhead --write    # also writes benchmarks/results/overhead.md

A step of `repr.fit`'s Trainer, with all that it does besides (the callbacks of `conf/fit.yaml`, logging, TensorBoard),
stands beside a bare loop of the same objective, optimizer and schedule on the same batch, a step each by turns. The
mark: at most 3 % or 2 ms, whichever is more.

The start is that of new processes, by turns: `python -m repr.fit` of SimCLR, which checks its config, forecasts its
memory and draws its first pictures; a script that trains the same backbone on the same pictures by lightly's transform,
head and loss under Lightning's Trainer, as in lightly's documentation; and one that only imports torch and Lightning.
A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from benchmarks.gpu.common import Same
from benchmarks.report import hardware, publish
from repr.config import compose
from repr.config_check import check
from repr.data.datamodule import DataModule
from repr.optim import clip_each
from repr.runs.inputs import check_inputs
from repr.training.trainer import make_trainer, prepare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/overhead.md"
RESNET18 = ["image_size=96", "backbone.name=resnet18", "data.batch_size=32"]
CASES = {  # small steps, in which an overhead shows, and larger ones
    "SimCLR, a network of four convolutions, 2 x 32, batch 64": ["experiment=simclr_emoji"],
    "CLIP, ResNet-10, 1 x 64, batch 128 (the demo)": ["experiment=demo", "backbone.name=resnet10t"],
    "DINO, a network of four convolutions, multi-crop, batch 64": ["experiment=dino_emoji"],
    "SimCLR, ResNet-18, 2 x 96, batch 32": ["experiment=simclr_emoji", *RESNET18],
}
SHARE, MILLISECONDS = 0.03, 2.0  # the mark
WARM = 5


class BareLoop(pl.Callback):
    """Makes a step of a bare loop after each of the Trainer, and times both.

    Args:
        objective: of the bare loop, with the weights of the Trainer's.
        optimizer: of that.
        schedule: of that.
        seconds: after so many the Trainer stops.
    """

    def __init__(self, objective: Any, optimizer: Any, schedule: Any, seconds: float) -> None:
        self.objective, self.optimizer, self.schedule, self.seconds = objective, optimizer, schedule, seconds
        self.trainers, self.bare = list[float](), list[float]()
        self.begin = self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """The last callback that hears of a batch."""
        now = time.perf_counter()
        self.trainers.append(now - self.since)
        self.optimizer.zero_grad()
        self.objective.total(self.objective.step(batch).terms).backward()
        if self.objective.optim.clip_each is not None:
            clip_each(self.objective.parameters(), self.objective.optim.clip_each)
        self.optimizer.step()
        self.schedule.step()
        self.objective.finish_step()
        self.since = time.perf_counter()
        self.bare.append(self.since - now)
        trainer.should_stop = self.since - self.begin > self.seconds and len(self.bare) >= 4 * WARM


def compared(overrides: list[str], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each step, of our Trainer and of a bare loop, by turns."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # what the run prints
        quiet = ["callbacks.evaluation=null", "data.num_workers=0"]
        cfg = compose([*overrides, f"run_folder={folder}/run", "trainer.accelerator=cpu", *quiet])
        cfg.data.eval = {}
        cfg.trainer.update({"max_epochs": -1, "max_steps": 10**6, "limit_val_batches": 0})
        check(cfg)
        check_inputs(cfg)
        torch.manual_seed(0)
        objective, bare = instantiate(cfg.objective), instantiate(cfg.objective)
        data: DataModule = instantiate(cfg.data)
        ready = next(iter(data.train_dataloader()))
        callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]
        trainer = make_trainer(cfg, callbacks, [instantiate(node) for node in cfg.logger.values() if node])
        for module in (objective, bare):
            prepare(module, cfg, 1)
        bare.load_state_dict(objective.state_dict())
        bare.step_number, bare.total_steps = 0, 10**6
        optimizer, schedule = bare.optim.build(bare, 10**6)
        loop = BareLoop(bare, optimizer, schedule, seconds)
        trainer.callbacks.append(loop)  # type: ignore[attr-defined]
        ready = data.on_after_batch_transfer(ready, 0)
        trainer.fit(objective, DataLoader(Same(ready), batch_size=None))  # type: ignore[arg-type]
    return loop.trainers[WARM:], loop.bare[WARM:]


# Where stable-pretraining is installed, it adds callbacks of its own to lightly's Trainer.
FIRST_STEP = """
import time
import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors import callback_connector
callback_connector._load_external_callbacks = lambda group: []
class FirstStep(pl.Callback):
    def on_train_batch_end(self, *args):
        print("first step", time.time(), flush=True)
"""
OURS = ["-m", "repr.fit", "experiment=simclr_emoji", "trainer.max_epochs=-1", "trainer.max_steps=1",
        "trainer.accelerator=cpu", "optim.warmup_steps=0", "+callbacks.first._target_=benchmarks.overhead.FirstStep",
        "callbacks.evaluation=null"]  # fmt: skip
BARE = "import time, torch, lightning.pytorch; print('first step', time.time())"
LIGHTLY = (
    FIRST_STEP
    + """
import timm, torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from repr.data.sources.emoji import Emoji
class Pictures(torch.utils.data.Dataset):
    def __init__(self):
        self.source, self.transform = Emoji("train"), SimCLRTransform(input_size=32)
    def __len__(self):
        return len(self.source)
    def __getitem__(self, row):
        return self.transform(self.source.image(row))
class SimCLR(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.head, self.loss = SimCLRProjectionHead(self.backbone.num_features, 512, 128), NTXentLoss(0.1)
    def training_step(self, views, index):
        loss = self.loss(*(self.head(self.backbone(view)) for view in views))
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
loader = torch.utils.data.DataLoader(Pictures(), batch_size=64, shuffle=True)
pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[FirstStep()], default_root_dir=FOLDER).fit(SimCLR(), loader)
"""
)


class FirstStep(pl.Callback):
    """Says when the first step has ended."""

    def on_train_batch_end(self, *args: Any) -> None:
        """Print the time since the epoch."""
        print("first step", time.time(), flush=True)


def starts(num: int) -> dict[str, list[float]]:
    """Seconds from the start of a process to the end of its first step, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "`python -m repr.fit`": [*OURS, f"run_folder={folder}/run"],
            "lightly under Lightning": ["-c", LIGHTLY.replace("FOLDER", repr(folder))],
            "importing torch and Lightning": ["-c", BARE],
        }
        found: dict[str, list[float]] = {}
        for _ in range(num):
            for name, words in commands.items():
                start = time.time()
                done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{name} is left out: {done.stderr.splitlines()[-1:]}", file=sys.stderr, flush=True)
                    continue
                (told,) = (line.split()[-1] for line in done.stdout.splitlines() if line.startswith("first step"))
                found.setdefault(name, []).append(float(told) - start)
                subprocess.run(["rm", "-rf", f"{folder}/run"], check=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seconds and starts")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    seconds, num = (10, 2) if options.quick else (60, 5)
    lines = [
        "# What the Trainer adds to a step, and the start",
        "",
        f"`{' '.join(['python -m benchmarks.overhead', *sys.argv[1:]])}`; the load is that before.",
        "",
        hardware("torch", "lightning", "timm", "lightly"),
        "",
        f"Median milliseconds of a step on a batch that is ready, {seconds} s of both by turns:",
        "",
        "| case | our Trainer | a bare loop | difference | share | steps | mark |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for case, overrides in CASES.items():
        times = compared(overrides, seconds)
        ours, bare = (1e3 * median(of_each) for of_each in times)
        more = ours - bare
        met = "met" if more <= max(MILLISECONDS, SHARE * bare) else "missed"
        lines.append(
            f"| {case} | {ours:.1f} | {bare:.1f} | {more:+.1f} | {more / bare:+.1%} | {len(times[0])} | {met} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", f"Seconds from the command to the end of the first step, least of {num}, by turns:", ""]
    lines += ["| | seconds | ours / it |", "|---|---:|---:|"]
    found = {name: min(times) for name, times in starts(num).items()}
    ours = next(iter(found.values()))
    lines += [f"| {name} | {value:.1f} | {ours / value:.2f} |" for name, value in found.items()]
    publish(lines, RESULTS if options.write else None)


if __name__ == "__main__":
    main()
