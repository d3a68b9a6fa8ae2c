"""What only a GPU can show, in under five minutes: ``make test-gpu``, or ``pytest -m gpu`` where packages were carried.

``TEST_DEVICE=cpu pytest -m gpu tests/test_gpu.py`` rehearses all that a CPU can do, in float32.
"""

import copy
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from repr.config import compose
from repr.data.datamodule import DataModule
from repr.fit import main, train
from repr.models.batchnorm import SyncBatchNorm
from repr.optim import Optim
from repr.runs.checkpoint_files import read_checkpoint
from tests.objectives.conftest import OBJECTIVES, build, make_batch
from tests.test_experiments import EXPERIMENTS, SHORT
from tests.test_fit import TINY, rows, same, weights
from tests.test_resume import STEPS, assert_as_whole, last_saved, start

pytestmark = pytest.mark.gpu
Run = Callable[..., tuple[int, str]]
TOLERANCE = 1e-3  # of ten losses of the CPU and of the GPU, relative to the largest


def place(device: torch.device, precision: str = "bf16-mixed") -> list[str]:
    """Where a run is to run; a rehearsal on the CPU is in float32."""
    if device.type == "cpu":
        return ["trainer.accelerator=cpu", "trainer.precision=32-true"]
    return ["trainer.accelerator=gpu", f"trainer.precision={precision}"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_in_bf16(experiment: str, device: torch.device, tmp_path: Path) -> None:
    small = [f"++backbone.depth={SHORT[experiment]}"] if experiment in SHORT else []
    small += ["procedure.num_stages=2"] if experiment.startswith("mcl") else []
    main([f"experiment={experiment}", f"run_folder={tmp_path}/run", "smoke=true", *place(device), *small])
    losses = [float(row["train/loss"]) for path in tmp_path.rglob("metrics.csv") for row in rows(path.parent)[:2]]
    shutil.rmtree(tmp_path)  # gigabytes of checkpoints
    assert losses
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "options",
    [
        ["experiment=clip_vit_b32", "++backbone.depth=2", "compile=true"],
        ["experiment=mae_vit_b16", "++backbone.depth=2", "trainer=fsdp"],
        ["experiment=simclr_rn50", "backbone.name=test_resnet", "sync_batchnorm=true", "trainer=ddp"],
    ],
    ids=["compiled", "FSDP2", "DDP"],
)
def test_a_run_is_compiled_sharded_or_synchronised(options: list[str], device: torch.device, tmp_path: Path) -> None:
    small = ["trainer.devices=1", "smoke=true", *place(device), f"run_folder={tmp_path}/run"]
    command = [sys.executable, "-m", "repr.fit", *options, *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "step=2.ckpt")
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values() if tensor.is_floating_point())


def test_half_precision_is_scaled_and_guarded(device: torch.device, run: Run, tmp_path: Path) -> None:
    """A scale that is too high at the start costs steps, which the scaler leaves out, and the guard lets it."""
    few = [*TINY, "trainer.max_epochs=4", "trainer.gradient_clip_val=1", "callbacks.guard.action=skip"]
    status, out = run(f"run_folder={tmp_path}", *few, *place(device, "16-mixed"))
    assert status == 0, out
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values() if tensor.is_floating_point())


def test_a_run_pins_its_batches_and_fuses_its_optimizer(device: torch.device, tmp_path: Path) -> None:
    on_gpu = device.type == "cuda"
    done = train(compose([*TINY, f"run_folder={tmp_path}", *(["trainer=gpu"] if on_gpu else place(device))]))
    assert isinstance(done.datamodule, DataModule)
    assert done.datamodule.train_dataloader().pin_memory is on_gpu
    assert done.trainer.precision == ("bf16-mixed" if on_gpu else "32-true")
    assert {group["fused"] for group in done.trainer.optimizers[0].param_groups} == {True if on_gpu else None}


def test_a_killed_run_goes_on_with_the_generators_of_the_gpu(device: torch.device, run: Run, tmp_path: Path) -> None:
    """Drop path draws on the device; bit for bit, so the run is deterministic."""
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill = ["+callbacks.kill._target_=tests.signals.SignalAt", "+callbacks.kill.step=5"]
    kill += [f"+callbacks.kill.number={int(signal.SIGKILL)}"]
    for folder, status, extra in zip(folders, (0, -signal.SIGKILL), ([], kill), strict=True):
        ended, out = run(*start(folder, *place(device), "trainer.deterministic=true", *extra))
        assert ended == status, out
    ended, out = run(f"resume={killed}", "trust=true", "callbacks.kill.step=-1")
    assert ended == 0, out
    assert_as_whole(killed, whole, 5, last_saved(5))
    assert int(rows(killed)[-1]["step"]) == STEPS - 1


def test_deterministic_runs_are_equal_to_the_bit(device: torch.device, run: Run, tmp_path: Path) -> None:
    few = ["smoke=true", "objective=simclr", "backbone.name=test_resnet", "trainer.deterministic=true", *place(device)]
    for name in ("a", "b"):
        status, out = run(f"run_folder={tmp_path}/{name}", *few, "trainer.limit_train_batches=8")
        assert status == 0, out
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_losses_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    """In float32 on both, convolutions too."""
    objective, losses = build(name), []
    batch = make_batch(12)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for where in (torch.device("cpu"), device):
            flow, data = copy.deepcopy(objective).to(where), move_data_to_device(batch, where)
            optimizer, _ = Optim(name="sgd", lr=3e-3, options={"momentum": 0.9}).build(flow, 10)
            losses.append([])
            for _ in range(10):
                optimizer.zero_grad()
                loss = flow.total(flow.step(data).terms)
                loss.backward()
                optimizer.step()
                flow.finish_step()
                losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=TOLERANCE * max(map(abs, losses[0])))


def test_batchnorm_over_two_processes_is_that_of_the_whole_batch(device: torch.device, tmp_path: Path) -> None:
    """Both are on one card, which gloo allows and NCCL does not."""
    mp.start_processes(_normalise, (str(tmp_path), device.type), nprocs=2, start_method="spawn")
    x = _rows().requires_grad_()
    norm = nn.BatchNorm2d(3)
    y = norm(x)
    (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, expected in {"y": y.detach(), "grad": x.grad}.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0]["running_var"], norm.running_var, rtol=1e-4, atol=1e-5)


def _rows() -> torch.Tensor:
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def _normalise(rank: int, folder: str, device: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = slice(4 * rank, 4 * rank + 4)
    x = _rows()[mine].to(device).requires_grad_()
    norm = SyncBatchNorm(3).to(device)
    y = norm(x)
    factors = torch.linspace(0, 1, 2 * y.numel()).view(8, *y.shape[1:])[mine]
    (y * factors.to(device)).sum().backward()
    assert x.grad is not None
    assert norm.running_var is not None
    found = {"y": y.detach(), "grad": x.grad, "running_var": norm.running_var}
    torch.save({name: tensor.cpu() for name, tensor in found.items()}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
