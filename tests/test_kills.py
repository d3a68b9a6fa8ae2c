"""Runs that are killed again and again, at any moment: the weights and the rows are those of an uninterrupted run."""

import math
import os
import random
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import last_checkpoint
from repr.runs.folder import can_resume
from repr.training.throughput import Throughput
from tests.conftest import RunGroup
from tests.test_fit import TINY, rows

KILLS = int(os.environ.get("KILLS", "2"))  # of each flow; 30 take half an hour on two cores, and more on two processes
NUM_STEPS = 15
# Three steps an epoch, the last one of one batch; a checkpoint at every second step and at the end of each epoch;
# evaluations in the middle of epochs and at their ends.
SETUP = [
    "trainer.max_epochs=5", "trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2",
    "trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1.0", "trainer.limit_val_batches=1",
    "callbacks.checkpoints.every_n_steps=2", "callbacks.collapse.every=1", "callbacks.pictures=null",
    "optim.lr=1e-3", "data.bank_size=32",
]  # fmt: skip
KILL = ["+callbacks.kill._target_=tests.signals.KillAt", "+callbacks.kill.folder=${run_folder}/checkpoints"]
SMALL_VIT = ["+backbone.drop_path_rate=0.2"]
FLOWS = {
    "clip": [*TINY, *SMALL_VIT, "data.num_workers=1", "eval.zero_shot=null", "eval.headline=[]"],
    "clip, steps": [
        *TINY, *SMALL_VIT, "trainer.max_steps=13", "trainer.max_epochs=-1", "trainer.val_check_interval=3",
        "trainer.check_val_every_n_epoch=null", "eval.zero_shot=null", "eval.headline=[]",
    ],
    "clip, average": [
        *TINY, *SMALL_VIT, "micro_batch=4", "eval.zero_shot=null", "eval.headline=[]",
        "+callbacks.average._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.average.decay=0.9",
    ],
    "simclr": ["experiment=simclr_emoji", "smoke=true", "objective.hidden_dim=16"],
    "swav": [
        "experiment=swav_emoji", "smoke=true", "objective.queue_length=32", "objective.hidden_dim=16",
        "objective.dim=8", "objective.num_prototypes=10", "objective.freeze_steps=2", "data.num_workers=1",
    ],
    "byol, queue": [
        "experiment=byol_emoji", "smoke=true", "objective.hidden_dim=16", "objective.dim=8",
        "objective.queue_length=32", "+objective.weights.contrast=1",
    ],
    "densecl": [  # two queues, and two projectors that the teacher follows
        "experiment=densecl_scenes", "eval=images", "smoke=true", "objective.hidden_dim=16", "objective.dim=8",
        "objective.queue_length=32", "objective.final_momentum=1",
    ],
    "ijepa": ["experiment=ijepa_emoji", "smoke=true", "backbone.depth=1", *SMALL_VIT, "objective.decoder.depth=1"],
    "class pairs": [
        "experiment=class_pairs_trifeature", "smoke=true", "objective.hidden_dim=16", "objective.dim=8",
        "objective.class_dim=8", "objective.gate_dim=16",
    ],
    "ibot": [
        "experiment=ibot_emoji", "smoke=true", "backbone.depth=1", *SMALL_VIT, "objective.hidden_dim=16",
        "objective.dim=8", "objective.num_prototypes=10", "objective.freeze_steps=2", "objective.temperature_steps=6",
        "objective.teacher_temperature=0.07", "+optim.final_weight_decay=0.2",
    ],
    "pixpro": [
        "experiment=pixpro_emoji", "smoke=true", "objective.hidden_dim=16", "objective.dim=8",
        "objective.weights.instance=1", "trainer.val_check_interval=2",
    ],
    "albef": [
        "experiment=albef_emoji", "smoke=true", "backbone.depth=1", *SMALL_VIT, "objective.queue_length=32",
        "objective.num_layers=1", "objective.alpha_steps=6", "eval.rerank=null",
    ],
    "negclip, neighbours": [
        "experiment=negclip_composition", "smoke=true", "data.num_workers=1",
    ],
    "m3col": ["experiment=m3col_emoji", "smoke=true", "backbone.depth=1", "objective.mixing.switch=0.6"],
    "mae": ["experiment=mae_emoji", "smoke=true", "backbone.depth=1", "objective.decoder.depth=1"],
    "hybrid": [  # from the eighth of fifteen steps on
        *TINY, *SMALL_VIT, "objective=clip_byol", "+objective.stages.byol=[0.5,1]", "eval.zero_shot=null",
        "eval.headline=[]", "+objective.parts.byol.hidden_dim=16", "+objective.parts.byol.dim=8",
        "optim.warmup_steps=2",
    ],
    "mcl": [
        *TINY, *SMALL_VIT, "objective=clip", "procedure=multistage", "procedure.num_stages=2",
        "procedure.clustering.n_clusters=3", "data.num_workers=1", "eval.zero_shot=null", "eval.headline=[]",
    ],
}  # fmt: skip
SCHEDULES = {  # a logged value at each share of the run
    "densecl": ("train/momentum", lambda share: 1 - 0.03 * (math.cos(math.pi * share) + 1) / 2),
    "ijepa": ("train/momentum", lambda share: 0.97 + 0.03 * share),
    "pixpro": ("train/momentum", lambda share: 1 - 0.01 * (math.cos(math.pi * share) + 1) / 2),
    "ibot": ("train/teacher_temperature", lambda share: 0.04 + 0.03 * min(share * NUM_STEPS / 6, 1)),
    "m3col": ("train/mixed", lambda share: float(share < 0.6)),
}

# A start in stages takes twice as long, and tests/procedures/test_multistage.py kills it at every kind of place.
ON_ONE = [flow for flow in FLOWS if flow != "mcl"]
ON_TWO = [("ddp", "hybrid"), ("fsdp", "pixpro")]
if KILLS > 10:  # every flow, on two processes under both
    ON_ONE = [*FLOWS]
    ON_TWO = [(trainer, flow) for trainer in ("ddp", "fsdp") for flow in FLOWS]
    ON_TWO.remove(("fsdp", "clip, average"))  # which the check of the config refuses


def command(flow: str, folder: Path, place: str = "nowhere", number: int = 1) -> list[str]:
    """Starts a run, or lets it go on."""
    kill = [f"callbacks.kill.place={place}", f"callbacks.kill.number={number}"]
    if can_resume(folder):
        return [f"resume={folder}", "trust=true", *kill]
    return [f"run_folder={folder}", *SETUP, *FLOWS[flow], *KILL, *(f"+{option}" for option in kill)]


def chain(
    seed: str,
    num_kills: int,
    flow: str,
    folder: Path,
    run_group: RunGroup,
    world: int = 1,
    options: tuple[str, ...] = (),
) -> int:
    """Kill a run again and again, then let it end; gives how often it was killed, since it may end before."""
    draw = random.Random(seed)
    for killed in range(num_kills):
        place = draw.choices(("batch", "saving", "saved", "time"), (5, 2, 2, 1))[0]
        after = draw.uniform(0.1, 4.0) if place == "time" else None
        line = command(flow, folder, place, draw.randint(1, 5))
        ended = run_group(world, *line, *options, kill_after=after)
        if all(status == 0 for status, _ in ended):
            return killed
        for status, out in ended:
            assert status == -signal.SIGKILL, out
    for status, out in run_group(world, *command(flow, folder), *options):
        assert status == 0, out
    return num_kills


def runs(folder: Path) -> list[Path]:
    """The folders of all runs, in each of which a stage was trained."""
    return sorted(path.parent for path in folder.rglob("checkpoints"))


def assert_same(folder: Path, whole: Path) -> None:
    assert [run.relative_to(folder) for run in runs(folder)] == [run.relative_to(whole) for run in runs(whole)]
    for one, other in zip(runs(folder), runs(whole), strict=True):
        ends = [last_checkpoint(run) for run in (one, other)]
        assert ends[0].name == ends[1].name
        assert [path.name for path in (one / "checkpoints").iterdir()] == [ends[0].name]
        a, b = (content(path) for path in ends)
        assert a.keys() == b.keys()
        assert not [name for name in a if not equal(a[name], b[name])]
        assert table(one) == table(other)


def content(path: Path) -> dict:
    """All that training goes on from."""
    saved = read_checkpoint(path)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "DataModule")
    names += ("current_model_state", "averaging_state")
    return {name: saved[name] for name in names if name in saved}


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of a run, but for its speed."""
    return [{name: value for name, value in row.items() if name not in Throughput.meanings} for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(run_group: RunGroup, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that nothing interrupts, of each flow."""

    @cache
    def whole(flow: str, world: int = 1, options: tuple[str, ...] = ()) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        for status, out in run_group(world, *command(flow, folder), *options):
            assert status == 0, out
        return folder

    return whole


def kill_again_and_again(
    num_kills: int,
    flow: str,
    folder: Path,
    run_group: RunGroup,
    whole: Callable[..., Path],
    *where: Any,
) -> None:
    """So many kills in a chain; one that has ended before is followed by another, and each ends as the whole run."""
    killed = 0
    for number in range(9):
        run = folder / str(number)
        killed += chain(f"{where} {flow} {number}", num_kills - killed, flow, run, run_group, *where)
        assert_same(run, whole(flow, *where))
        if killed == num_kills:
            return
    pytest.fail(f"killed {killed} times only")


@pytest.mark.parametrize("flow", [pytest.param(flow, marks=[pytest.mark.slow] * (flow != "clip")) for flow in ON_ONE])
def test_every_flow_is_killed_again_and_again(
    flow: str, run_group: RunGroup, whole: Callable[..., Path], tmp_path: Path
) -> None:
    num_kills = KILLS // 2 if flow in ("mcl", "clip, steps", "clip, average") else KILLS  # CLIP comes three times
    kill_again_and_again(num_kills, flow, tmp_path, run_group, whole)
    if flow in SCHEDULES:  # what all of them have logged is right, too
        name, value = SCHEDULES[flow]
        logged = [float(row[name]) for row in rows(whole(flow)) if row.get(name)]
        assert logged == pytest.approx([value(step / NUM_STEPS) for step in range(NUM_STEPS)], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "flow"), ON_TWO)
def test_two_processes_are_killed_again_and_again(
    trainer: str, flow: str, run_group: RunGroup, whole: Callable[..., Path], tmp_path: Path
) -> None:
    options = (f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2")
    kill_again_and_again(KILLS, flow, tmp_path, run_group, whole, 2, options)
