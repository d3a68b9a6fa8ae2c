"""Values of a config that are out of range, or exclude each other, found without an import of torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from repr.config import source_of, targets

# The least value of an argument of ours, by its name, which has one meaning wherever it stands.
_LEAST = {
    **dict.fromkeys(("dim", "hidden_dim", "predictor_dim", "class_dim", "gate_dim", "output_dim", "width"), 1),
    **dict.fromkeys(("depth", "layers", "num_layers", "decoder_layers", "num_heads", "pooler_heads"), 1),
    **dict.fromkeys(("num_classes", "num_prototypes", "num_words", "num_levels", "num_iters", "num_directions"), 1),
    **dict.fromkeys(("num_knots", "context_length", "vocab_size"), 1),
    **dict.fromkeys(("predictor_layers", "queue_length", "queue_start_step", "freeze_steps"), 0),
    **dict.fromkeys(("temperature_steps", "alpha_steps", "num_workers"), 0),
}
_POSITIVE = ("temperature", "teacher_temperature", "first_teacher_temperature", "epsilon", "threshold")
# Callbacks of Lightning that a run cannot have, and what to do without them.
_UNFIT = {
    "GradientAccumulationScheduler": "a resumed run finds its place by a number of batches a step that stays: leave it "
    "out, and set trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it takes the schedules of optim away, and no checkpoint holds its weights: leave it "
    "out, and take EMAWeightAveraging",
}


def range_faults(cfg: DictConfig) -> Iterator[str]:
    """Say of each option that is out of range, or excludes another, what to set it to.

    Args:
        cfg: a config whose values can be resolved.
    """
    if cfg.get("run_folder") == "":
        yield "run_folder is empty: name a folder, or leave it out"
    if isinstance(seed := cfg.get("seed"), int) and not 0 <= seed < 2**32:
        yield f"seed={seed}; set it to a whole number from 0 to {2**32 - 1}"
    for path, node in targets(cfg):
        if str(node["_target_"]).startswith("repr."):
            yield from _argument_faults(cfg, path, node)
    if "objective" in cfg:
        yield from _trainer_faults(cfg.trainer)
        yield from _exclusion_faults(cfg)


def _argument_faults(cfg: DictConfig, path: str, node: DictConfig) -> Iterator[str]:
    for name in node:
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in _LEAST and value < _LEAST[name]:
            yield f"{source_of(cfg, f'{path}.{name}')}={value}; set it to {_LEAST[name]} or more"
        if name in _POSITIVE and value <= 0:
            yield f"{source_of(cfg, f'{path}.{name}')}={value}; set it above 0"


def _trainer_faults(trainer: DictConfig) -> Iterator[str]:
    if isinstance(devices := trainer.get("devices"), int) and devices < 1 and devices != -1:
        yield f"trainer.devices={devices}; set it to the number of processes of a machine, or to auto"
    counts = ("num_nodes", "accumulate_grad_batches", "check_val_every_n_epoch")
    for key, number in (dict.fromkeys(counts, 1) | {"max_epochs": -1, "max_steps": -1}).items():
        if isinstance(value := trainer.get(key), int | float) and not (isinstance(value, int) and value >= number):
            yield f"trainer.{key}={value}; set it to a whole number of {max(number, 0)} or more"
    if (limit := trainer.get("limit_train_batches")) is not None and limit == 0:
        yield f"trainer.limit_train_batches={limit} trains nothing: set it above 0, or to null for whole epochs"
    if isinstance(clip := trainer.get("gradient_clip_val"), int | float) and clip < 0:
        yield f"trainer.gradient_clip_val={clip}; set it to the largest norm of a gradient, or to null"
    if trainer.get("max_epochs") in (None, -1) and trainer.get("max_steps", -1) in (None, -1):
        yield "the run has no end: set trainer.max_epochs or trainer.max_steps"
    precision = str(trainer.get("precision"))
    if precision in ("64", "64-true", "16-true", "bf16-true") or precision.startswith("transformer-engine"):
        yield (
            f"trainer.precision={precision} would cast crop boxes and colour values with the batch (half precision "
            "moves the cells of a map) and the weights, but not the views, which are made afterwards: set it to "
            "bf16-mixed, 16-mixed or 32-true"
        )


def _exclusion_faults(cfg: DictConfig) -> Iterator[str]:
    devices, nodes, batch = cfg.trainer.get("devices"), cfg.trainer.get("num_nodes", 1), cfg.data.get("batch_size")
    counts = isinstance(devices, int) and isinstance(nodes, int) and nodes > 0 and isinstance(batch, int)
    if counts and devices > 0 and batch % (devices * nodes):
        yield (
            f"data.batch_size={batch} is the global batch and {devices * nodes} processes cannot share it evenly: "
            f"set it to a multiple of {devices * nodes}"
        )
    if counts and devices > 0 and isinstance(lanes := cfg.data.get("lanes"), int) and lanes % (devices * nodes):
        yield (
            f"data.lanes={lanes} and {devices * nodes} processes, each of which reads whole lanes: set it to a "
            f"multiple of {devices * nodes}"
        )
    views = cfg.get("views") or {}
    sizes = {key: cfg.get(key, 1) for key in ("image_size", "small_size")}
    sizes["data.image_size"] = cfg.data.get("image_size", 1)
    sizes |= {f"views.{name}.size": view.size for name, view in views.items() if view.get("size") is not None}
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            yield f"{key}={size}; set it to one number of pixels: pictures are square here"
    numbers = {f"views.{name}.count": view.get("count", 1) for name, view in views.items()} | {"data.batch_size": batch}
    numbers |= {f"data.{key}": cfg.data[key] for key in ("lanes", "window") if cfg.data.get(key) is not None}
    for key, number in numbers.items():
        if not isinstance(number, int):
            yield f"{key}={number}; set it to a whole number"
    for key, parts in (("micro_batch", "rows of an encoder"), ("chunk_size", "rows of the matrix of pairs")):
        value = cfg.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield f"{key}={value}; set it to the number of {parts} at a time, or to null for all at once"
    strategy = cfg.trainer.get("strategy")
    is_split = OmegaConf.is_dict(strategy) and str(strategy.get("_target_")).endswith("FSDP2")
    for path, node in targets(cfg):
        target = str(node["_target_"]).rpartition(".")[2] if path.startswith("callbacks.") else ""
        if target in _UNFIT:
            yield f"{path} is a {target}: {_UNFIT[target]}"
        elif is_split and target.endswith("WeightAveraging"):
            yield (
                f"{path}: Lightning's averaging copies the weights, and those of trainer=fsdp are split "
                "over processes: set trainer=ddp"
            )
    flows = [node for _, node in targets(cfg.objective)]  # those that are parts of one too
    for key, usual, wanted in (
        ("exchange", "gather", "no loss whose rows can be passed on"),
        ("loss_precision", "float32", "no loss of pairs"),
        ("false_negatives", "keep", "no contrast whose pairs could be left out"),
    ):
        if (value := cfg.get(key, usual)) not in (usual, *(node.get(key) for node in flows)):
            yield f"{key}={value}: this objective has {wanted}; set {key}={usual}"
    if cfg.get("chunk_size") and all(node.get("chunk_size") is None for node in flows):
        warnings.warn(f"chunk_size={cfg.chunk_size} changes nothing: this objective compares no pairs", stacklevel=2)
