"""Every objective on groups of processes: what it computes there, and how far that is from one process.

Used by the tests and by ``tests/parity.py``, which writes docs/parity.md. Processes are forks, so that imports and
models are made once. Models are float64: in float32 a value near the kink of a ReLU falls on the other side once
sums are taken in another order. Losses are float32 all the same.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from repr.batch import Batch
from repr.data.samplers import EvalBatchSampler
from repr.distributed import rank, world_size
from repr.evaluate.stored_features import READ, TableWriter
from repr.models.batchnorm import synchronise
from repr.models.slicing import slice_encoders
from repr.objectives.base import Objective
from repr.optim import Optim
from repr.shard import shard, whole
from tests.objectives.conftest import OBJECTIVES, VIT, build, make_batch

NUM_ROWS, NUM_STEPS = 12, 2  # rows of the global batch; optimizer steps
KEPT = 20_000  # entries of the gradient and of the update of each parameter
NUM_EVAL, EVAL_BATCH = 17, 12  # the last batch of evaluation has five rows, which no number of processes here divides
MICRO_BATCH = 2  # of 12, 6, 4 or 3 rows of a process
SGD = Optim(name="sgd", lr=3e-3, weight_decay=0.1, options={"momentum": 0.9})  # Adam would hide a scaled gradient

QUEUE = [f"objective.queue_length={NUM_ROWS}", f"data.batch_size={NUM_ROWS}"]  # acts from the second step
STRIDE_8 = ["backbone.name=test_resnet", "+backbone.output_stride=8"]  # a map of 4 x 4
PATCHES = ["+backbone.patch_size=8"]
TABLE = "+objective.tables.{}={{_target_: repr.models.heads.plain_mlp, widths: [{}, 8, 32]}}"
TABLES = [TABLE.format("a", 5), TABLE.format("b", 6)]
TABLES += [
    option
    for name in "ab"
    for option in (f"+objective.weights.{name}_head=1", f"+objective.mixing.levels.{name}=input")
]
VARIANTS: dict[str, dict[str, Any]] = {name: {"name": name} for name in OBJECTIVES} | {
    "mae_clip, blocks": {"name": "mae_clip", "overrides": ["+objective.masking.kind=block", *PATCHES]},
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
        "overrides": ["+objective.mixing.levels.image=input", "embed_dim=96"],
        "backbone": ["backbone=resnet", "backbone.name=test_resnet"],
    },
    "m3col, switched": {"name": "m3col", "overrides": ["objective.mixing.switch=0"]},
    "m3col, tables": {"name": "m3col", "overrides": TABLES},
    "cuaxu, ring in chunks": {"name": "cuaxu", "overrides": ["exchange=ring", "chunk_size=1"]},
    "simclr, ring": {"name": "simclr", "overrides": ["exchange=ring"]},
    "clip, false negatives masked": {"name": "clip", "overrides": ["false_negatives=mask_labels"]},
    "simclr, ring, false negatives masked": {
        "name": "simclr",
        "overrides": ["exchange=ring", "false_negatives=mask_labels"],
    },
    "negclip, pairs, ring in chunks, false negatives masked": {
        "name": "negclip",
        "overrides": [
            "exchange=ring",
            "chunk_size=1",
            "false_negatives=mask_labels",
            "+objective.weights.pairs=1",
            "+data.neighbours=items",
        ],
    },
    "clip, BatchNorm": {"name": "clip", "backbone": ["backbone.name=test_resnet"]},
    "simclr, hallucination": {"name": "simclr", "overrides": ["objective.weights.hallucination=1"]},
    "mocov3, hallucination": {"name": "mocov3", "overrides": ["+objective.weights.hallucination=1"]},
    "class_pairs, renormalised pairs in chunks": {
        "name": "class_pairs",
        "overrides": ["objective.renormalise=true", "objective.reduction=pairs", "chunk_size=2"],
    },
    "clip_byol, a stage from the second step on": {
        "name": "clip_byol",
        "overrides": ["+objective.stages.byol=[0.5,1]"],
    },
    "simclr, BatchNorm with activation": {"name": "simclr", "backbone": ["backbone.name=test_efficientnet"]},
}


class Column(NamedTuple):
    """A group of processes."""

    world: int
    strategy: str  # none, ddp, fsdp2


ONE = "1 process"
COLUMNS = {
    ONE: Column(1, "none"),
    "2 DDP": Column(2, "ddp"),
    "3 DDP": Column(3, "ddp"),
    "4 DDP": Column(4, "ddp"),
    "2 FSDP2": Column(2, "fsdp2"),
}
Record = dict[str, Tensor]
Records = dict[str, Record]  # variant -> what was computed


@cache
def objective_of(variant: str) -> Objective:
    """Built once; whoever trains it takes a copy."""
    options = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class token is not trained
        objective = build(options["name"], *options.get("overrides", ()), backbone=options.get("backbone", VIT))
    objective.optim = SGD
    synchronise(objective)  # sync_batchnorm=true; others have it anyway
    return objective.double()


def can_be_sliced(variant: str) -> bool:
    """Whether slices see what the whole sees: an encoder with BatchNorm does not."""
    return "BatchNorm" not in variant


class Step(nn.Module):
    """The loss as ``forward``, which is what DDP wraps."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.total(self.objective.step(batch).terms)


def share_of(batch: Batch, num: int) -> Batch:
    """This process's rows of a global batch of ``num``."""
    size = num // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    names = ("index", "seed", "boxes", "text", "texts", "hard_text", "mated", "label")
    rows = {name: batch[name][mine] for name in names if name in batch}  # type: ignore[literal-required]
    views, tables = ([x[mine].double() for x in batch[name]] for name in ("views", "tables"))  # type: ignore[literal-required]
    return Batch(views=views, tables=tables, **rows)


def train(variant: str, strategy: str, *, sliced: bool) -> Record:
    """Losses, first gradient, update after all steps, buffers, and features of a set that no batch divides."""
    objective = copy.deepcopy(objective_of(variant))
    slice_encoders(objective, MICRO_BATCH if sliced else None)
    start = [p.detach().clone() for p in objective.parameters()]
    if strategy == "fsdp2":
        shard(objective, init_device_mesh("cpu", (world_size(),)))
    model: nn.Module = Step(objective)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    optimizer, _ = objective.optim.build(objective, NUM_STEPS)
    if getattr(objective, "stages", None):
        objective.total_steps = NUM_STEPS
    batch = share_of(make_batch(NUM_ROWS, objective=VARIANTS[variant]["name"]), NUM_ROWS)
    losses, grads = [], []
    for i in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        losses.append(loss.detach())
        if objective.total_steps:
            objective.on_before_optimizer_step(optimizer)
        if i == 0:
            grads = [some(whole(p.grad)).clone() for p in objective.parameters() if p.grad is not None]
        optimizer.step()
        objective.finish_step()
    update = [some(whole(p.detach()) - before) for p, before in zip(objective.parameters(), start, strict=True)]
    record = {"loss": torch.stack(losses), "grad": torch.cat(grads), "update": torch.cat(update)}
    record |= {f"buffer.{name}": buffer.clone() for name, buffer in objective.named_buffers()}
    return record | {"image": evaluate(objective)}


def some(x: Tensor) -> Tensor:
    """Up to KEPT entries, evenly spread: whole vocabularies of all processes would be gigabytes on a disk."""
    x = x.flatten()
    return x[:: -(-len(x) // KEPT) | 1]  # odd, so that no column of a matrix is passed over


@torch.no_grad()
def evaluate(objective: Objective) -> Tensor:
    """Embeddings of a set whose last batch is uneven, (NUM_EVAL, D); on the first process."""
    objective.eval()
    table = TableWriter(torch.arange(NUM_EVAL), select=lambda outputs: {"image": F.normalize(outputs.image.float())})
    data = make_batch(NUM_EVAL, seed=2)
    for rows in EvalBatchSampler(NUM_EVAL, EVAL_BATCH, rank=rank(), world_size=world_size()):
        batch = Batch(index=data["index"][rows], image=data["views"][0][rows].double(), text=data["text"][rows])
        table.on_predict_batch_end(None, None, objective.predict_step(batch, 0), batch, 0)  # type: ignore[arg-type]
    if rank():
        return torch.empty(0)
    assert table.columns[READ].all()
    return torch.from_numpy(table.columns["image"])


def differences(record: Record, reference: Record) -> dict[str, float]:
    """Of what a group has computed from what one process has on the whole batch.

    ``loss``: of the first step; ``ratio`` and ``cosine`` of its gradient; ``later``: of the other losses, both relative
    to the largest, since a sum of terms may pass zero; ``update``: length of the difference over the length.
    """
    ours, theirs = (r["grad"].double() for r in (record, reference))
    loss = (record["loss"] - reference["loss"]).abs() / reference["loss"].abs().max()
    return {
        "loss": loss[0].item(),
        "later": loss[1:].max().item(),
        "ratio": (ours.norm() / theirs.norm()).item(),
        "cosine": torch.cosine_similarity(ours, theirs, dim=0).item(),
        "update": relative(record["update"], reference["update"]),
    }


def relative(a: Tensor, b: Tensor) -> float:
    """Length of the difference over the length."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# Groups of processes --------------------------------------------------------------------------------------------------


def in_processes(work: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` gives on each of ``world`` processes that can talk to each other over gloo."""
    mp.start_processes(_process, (work, world, str(folder), arguments), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(world)]


def _process(index: int, work: Callable[..., Any], world: int, folder: str, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=world)
    torch.save(work(*arguments), Path(folder, f"{index}.pt"))
    dist.destroy_process_group()


def train_all(variants: Sequence[str], strategy: str, sliced: bool) -> Records:
    return {variant: train(variant, strategy, sliced=sliced) for variant in variants}


def column(name: str, folder: Path, variants: Sequence[str], *, sliced: bool) -> list[Records]:
    """What each process of a column has computed."""
    world, strategy = COLUMNS[name]
    for variant in variants:
        objective_of(variant)  # before the fork
    if world == 1:
        return [train_all(variants, strategy, sliced)]
    return in_processes(train_all, world, folder, variants, strategy, sliced)
