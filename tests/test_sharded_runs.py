"""Runs on several processes, sharded or not, that are killed and go on on another number of them."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import last_checkpoint
from tests.conftest import RunGroup
from tests.test_fit import rows

STEPS = 6
# A queue, prototypes that are frozen for a step, SyncBatchNorm, LARS, whose norms are those of whole weights.
SWAV = [
    "experiment=swav_emoji", "smoke=true", "data.batch_size=12", "objective.queue_length=24", "optim=lars",
    "objective.hidden_dim=16", "objective.dim=8", "objective.num_prototypes=10", "objective.freeze_steps=1",
    "small_size=16",
]  # fmt: skip
# A teacher with BatchNorm, moments of Adam (eps and rate are such that rounding stays small), clipped gradients.
PIXPRO = [
    "experiment=pixpro_emoji", "smoke=true", "data.batch_size=12", "objective.hidden_dim=16", "objective.dim=8",
    "objective.weights.instance=1", "optim=adamw", "trainer.gradient_clip_val=0.1", "optim.options.eps=1e-2",
    "optim.lr=1e-3",
]  # fmt: skip
FLOWS = {"swav": SWAV, "pixpro": PIXPRO}
SETUP = [
    f"trainer.limit_train_batches={STEPS}", "trainer.max_epochs=1", "trainer.limit_val_batches=0",
    "callbacks.checkpoints.every_n_steps=2", "trainer.accelerator=cpu", "optim.lr=1e-2", "optim.warmup_steps=0",
    "trainer.log_every_n_steps=1", "+callbacks.record._target_=tests.signals.Record",
    "+callbacks.kill._target_=tests.signals.SignalAt", f"+callbacks.kill.number={int(signal.SIGKILL)}",
]  # fmt: skip


def start(folder: Path, *overrides: str) -> list[str]:
    return [f"run_folder={folder}", *SETUP, f"+callbacks.record.file={folder}.jsonl", *overrides]


def on(world: int, strategy: str) -> list[str]:
    """What a run is told to run on several processes, or on one."""
    places = {"plain": ["trainer=cpu"], "ddp": ["trainer=ddp"], "fsdp2": ["trainer=fsdp"]}
    places["shards"] = [*places["fsdp2"], "trainer.strategy.save_distributed_checkpoint=true"]
    return [*places[strategy], "trainer.accelerator=cpu", f"trainer.devices={world}"]


def samples(folder: Path) -> list:
    return [json.loads(line) for line in Path(f"{folder}.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict:
    path = last_checkpoint(folder)
    assert path is not None
    return read_checkpoint(path)


def flat(content: dict) -> dict[str, Tensor]:
    """Weights and the state of the optimizer."""
    states = {
        f"optimizer.{index}.{key}": value
        for index, state in content["optimizer_states"][0]["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    return {**content["state_dict"], **states}


def assert_as(folder: Path, whole: Path) -> None:
    """A run that was interrupted has seen the same samples and ended with the same numbers, but for rounding."""
    seen = {step: (epoch, index) for step, epoch, index in samples(folder)}
    assert seen == {step: (epoch, index) for step, epoch, index in samples(whole)}
    a, b = flat(content(folder)), flat(content(whole))
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    losses = [[float(row["train/loss"]) for row in rows(f) if "train/loss" in row] for f in (folder, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture(scope="module")
def whole(run_group: RunGroup, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of one process that nothing interrupts, of each flow."""

    @cache
    def whole(flow: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / flow
        ((status, out),) = run_group(1, *start(folder, *FLOWS[flow], "+callbacks.kill.step=-1"))
        assert status == 0, out
        return folder

    return whole


# A process is killed two steps after each start but the last; then the run goes on on other processes. First it is the
# last process, then the first one, which holds the others together.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flow", "chain"),
    [
        ("swav", [(2, "shards"), (3, "fsdp2")]),
        ("swav", [(2, "ddp"), (2, "fsdp2"), (2, "ddp")]),
        ("pixpro", [(2, "shards"), (1, "plain"), (3, "shards")]),
    ],
)
def test_a_run_with_a_killed_process_goes_on_on_other_processes(
    flow: str, chain: list[tuple[int, str]], run_group: RunGroup, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for number, (world, strategy) in enumerate(chain):
        step = 2 * number + 2 if number < len(chain) - 1 else -1
        killed = 0 if number else world - 1
        kill = [f"callbacks.kill.step={step}", f"callbacks.kill.rank={killed}"]
        command = (
            [f"resume={folder}", "trust=true", *kill]
            if number
            else start(folder, *FLOWS[flow], *(f"+{k}" for k in kill))
        )
        for rank, (status, out) in enumerate(run_group(world, *command, *on(world, strategy))):
            if step == -1:
                assert status == 0, out
            elif rank == killed:
                assert status == -signal.SIGKILL, out
            else:
                assert status == 1, out
                assert "Traceback" not in out
                assert "error: another process has died" in out
                assert f"resume={folder} trust=true goes on from the last checkpoint" in out
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        assert names == [f"step={STEPS if step == -1 else step}.ckpt"]
    assert_as(folder, whole(flow))


@pytest.mark.slow
def test_of_processes_that_lightning_has_started_the_killed_one_is_named(tmp_path: Path) -> None:
    kill = ["+callbacks.kill.step=2", "+callbacks.kill.rank=1"]
    command = [sys.executable, "-m", "repr.fit", *start(tmp_path / "run", *FLOWS["swav"], *kill), *on(2, "ddp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Lightning's launcher looks every few seconds, and may be the first to see it on a machine that is busy.
    assert (done.returncode, done.stderr.count("terminated with code -9")) in {(1, 0), (1, 1), (-signal.SIGKILL, 1)}
    if done.returncode == 1:
        assert "error: another process has died (local rank 1 was ended by signal 9); resume=" in done.stderr


@pytest.mark.slow
def test_processes_that_lightning_has_started_do_not_outlive_the_first_one(tmp_path: Path) -> None:
    hang = ["+callbacks.hang._target_=tests.signals.HangAt", "+callbacks.hang.step=2", "+callbacks.hang.rank=1"]
    kill = ["+callbacks.kill.step=2", "+callbacks.kill.rank=0"]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "repr.fit", *start(folder, *FLOWS["swav"], *kill, *hang), *on(2, "ddp")]
    # Its output ends when the last process has gone.
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert f"error: the first process has died; resume={folder} trust=true goes on" in done.stderr
