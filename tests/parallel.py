"""The same training on one process and on several: plain, DDP or FSDP2. Tests compare what comes out."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from repr.batch import Batch
from repr.distributed import shard, whole
from repr.objectives.base import Objective
from tests.objectives.conftest import OBJECTIVES, VIT, build

Mode = Literal["plain", "ddp", "fsdp2"]

QUEUE = ["objective.queue_length=8", "data.batch_size=8"]  # acts from the second step
STRIDE_8 = ["backbone.name=test_resnet", "+backbone.output_stride=8"]  # a map of 4 x 4
PATCHES = ["+backbone.patch_size=8"]
TABLE = "+objective.tables.{}={{_target_: repr.models.heads.plain_mlp, widths: [{}, 8, 32]}}"
TABLES = [TABLE.format("a", 5), TABLE.format("b", 6)]
TABLES += [
    option for name in "ab" for option in (f"+objective.weights.{name}_head=1", f"+objective.mixing.{name}=input")
]
VARIANTS: dict[str, dict] = {name: {"name": name} for name in OBJECTIVES} | {
    "mae_clip, blocks": {"name": "mae_clip", "overrides": ["objective.masking=block", *PATCHES]},
    "mae_clip_tgm, many patches": {"name": "mae_clip_tgm", "overrides": PATCHES},
    "swav, queue": {"name": "swav", "overrides": QUEUE},
    "swav, BatchNorm, queue": {"name": "swav", "overrides": QUEUE, "backbone": ["backbone.name=test_resnet"]},
    "pixpro, BatchNorm, instance": {
        "name": "pixpro",
        "overrides": ["objective.weights.instance=1"],
        "backbone": STRIDE_8,
    },
    "m3col, pixels mixed, BatchNorm": {
        "name": "m3col",
        "overrides": ["+objective.mixing.image=input", "embed_dim=96"],
        "backbone": ["backbone.name=test_resnet"],
    },
    "m3col, switched": {"name": "m3col", "overrides": ["objective.switch=0"]},
    "m3col, tables": {"name": "m3col", "overrides": TABLES},
    "simclr, BatchNorm with activation": {"name": "simclr", "backbone": ["backbone.name=test_efficientnet"]},
}


def make(name: str, overrides: Sequence[str] = (), backbone: Sequence[str] = VIT) -> Objective:
    return build(name, "optim.lr=1e-2", *overrides, backbone=backbone)


def train(variant: str, batch: Batch, mode: Mode = "plain", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Losses, gradients, and state after three optimizer steps; sharded ones are put together.

    Args:
        variant: of VARIANTS.
        batch: the rows of this process.
        mode: what joins the processes of the default group.
        dtype: of parameters and pictures.
    """
    torch.manual_seed(0)
    objective = make(**VARIANTS[variant]).to(dtype)
    batch = Batch(**(batch | {name: [x.to(dtype) for x in batch[name]] for name in ("views", "tables")}))
    if mode == "fsdp2":
        shard(objective, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer, _ = objective.optim.build(objective, 3)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.objective = objective

        def forward(self) -> Tensor:
            return objective.total(objective.step(batch).terms)

    model = DistributedDataParallel(Step()) if mode == "ddp" else Step()
    record: dict[str, Tensor] = {}
    for i in range(3):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        record[f"loss.{i}"] = loss.detach()
        if i == 0:
            record |= {
                f"grad.{n}": whole(p.grad).clone() for n, p in objective.named_parameters() if p.grad is not None
            }
        optimizer.step()
        objective.update_targets()
    record |= {f"after.{n}": whole(p.detach()).clone() for n, p in objective.named_parameters()}
    return record | {f"buffer.{n}": p.clone() for n, p in objective.named_buffers()}


def share(batch: Batch, index: int, world: int) -> Batch:
    """The rows of one process."""
    num = len(batch["seed"]) // world
    mine = slice(num * index, num * (index + 1))
    rows = {name: batch[name][mine] for name in ("seed", "boxes", "text", "label")}
    return Batch(**rows, **{name: [rows_of[mine] for rows_of in batch[name]] for name in ("views", "tables")})


def spawn(work: Callable[[int], dict[str, Any]], world: int, folder: Path) -> list[dict[str, Any]]:
    """What ``work(rank)`` gives in each of several processes that are joined by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, args=(work, world, str(folder), port), nprocs=world)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(world)]


def _worker(index: int, work: Callable[[int], dict[str, Any]], world: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=index, world_size=world)
    torch.save(work(index), Path(folder, f"{index}.pt"))
    dist.destroy_process_group()
