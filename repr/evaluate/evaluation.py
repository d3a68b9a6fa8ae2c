"""Evaluate any encoder by the published protocols."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from repr.cli import is_first
from repr.config import CONF, ConfigError, compose
from repr.files import replacing
from repr.runs.folder import EVALUATION, EVALUATIONS, holder, load_run, run_folder

if TYPE_CHECKING:
    from repr.evaluate.foreign import Encoder
    from repr.evaluate.protocols import Number
FOREIGN = ("open_clip:", "timm:")


def evaluate(cfg: DictConfig, *, data_name: str = "data", class_files: Sequence[Path] = ()) -> dict[str, Any]:
    """Evaluate an encoder, on one process or on those of ``cfg.trainer``.

    Args:
        cfg: from :func:`config`, checked.
        data_name: what the data are called.
        class_files: those that zero-shot classification may choose among, where none are given for a set.

    Returns:
        What ``metrics.json`` holds, and on the first process ``folder``; empty on the others.

    Raises:
        ConfigError: there is no such model, or a class file does not fit.
        ValueError: it cannot take pictures of that size; too many rows of a set cannot be read.
    """
    from hydra.utils import instantiate

    from repr.distributed import rank
    from repr.evaluate.feature_tables import FeatureTables, check_dtype, short_hash
    from repr.evaluate.plan import make_plan
    from repr.evaluate.protocols import compute, finetuned
    from repr.report.exhibits import save_exhibits

    check_dtype(cfg.features)
    if not cfg.data.eval:
        raise ConfigError(["data.eval names no set to evaluate on: add one, as in README, 'Your own data'"])
    encoder = read_encoder(cfg.model, cfg.image_size)
    cfg = cfg.copy()
    cfg.image_size = encoder.image_size
    data = instantiate(cfg.data)
    folder = evaluation_folder(cfg.model)
    cfg.run_folder = str(folder)
    tables = FeatureTables(encoder, data, cfg, Path(cfg.cache or folder / "features"), cfg.features)
    plan = make_plan(cfg.eval, tables, class_files)
    tables.extract()
    learned = finetuned(plan, tables)
    if rank() or not is_first():
        return {}
    numbers, shown = compute(plan, tables)
    numbers |= learned
    asked: Any = OmegaConf.to_container(cfg.eval, resolve=True)
    protocol_hash = short_hash([tables.taken, asked, sorted({number.hash for number in numbers.values()})])
    out = Path(cfg.out) if cfg.out else folder / f"{data_name}-{protocol_hash}"
    found = {
        "format": 1,
        "protocol_hash": protocol_hash,
        "model": {"name": str(cfg.model), "hash": tables.model_hash},
        "data": {"name": data_name, "sets": tables.told()},
        "results": {name: _entry(number) for name, number in numbers.items()},
        "left_out": plan.left_out,
        "notes": encoder.notes,
        "versions": _versions(),
    }
    with replacing(out / EVALUATION) as file:
        file.write(json.dumps(found, indent=1).encode())
    save_exhibits(out, shown, {name: data.evaluated(name)[0] for name in data.eval_names})
    return found | {"folder": out}


def read_encoder(name: str, image_size: int | None) -> Encoder:
    """Any encoder.

    Args:
        name: a run folder, a checkpoint inside one, or what :func:`repr.evaluate.foreign.read_foreign` takes.
        image_size: side in pixels; None: its own.

    Raises:
        ConfigError: there is none.
        ValueError: it cannot take pictures of that size.
    """
    from functools import partial

    from hydra.utils import instantiate

    from repr.data.views import evaluation_view
    from repr.evaluate.foreign import HINT, Encoder, check_size, read_foreign, resize
    from repr.runs.folder import stage_folders
    from repr.runs.trained import Trained

    if name.startswith(FOREIGN):
        return read_foreign(name, image_size)
    if not Path(name).exists():
        raise ConfigError([f"model={name} does not exist; {HINT}"])
    if stages := stage_folders(name):
        from repr.runs.joined import load_joined

        module: Any = load_joined(name)
        run, has_text = load_run(next(iter(stages.values()))), module.text is not None
    else:
        trained = Trained.read(name)
        module, run, has_text = trained.objective, trained.cfg, trained.has_text
    own = run.data.image_size
    size = image_size or own
    if not stages:
        resize(module.backbone, size, own, name)
    check_size(module, size, name)
    mean, std = tuple(run.data.mean), tuple(run.data.std)
    return Encoder(
        module=module,
        transform=partial(evaluation_view, size=size),
        image_size=size,
        mean=mean,
        std=std,
        tokenizer=instantiate(run.tokenizer) if has_text and run.get("tokenizer") else None,
        preprocessing={
            "resolution": size,
            "resize": "shorter side to the resolution",
            "crop": "centre",
            "interpolation": "bicubic",
            "mean": list(mean),
            "std": list(std),
        },
    )


def evaluation_folder(name: str) -> Path:
    """Where evaluations of a model are kept: below its run folder, or below ``runs`` in the working folder."""
    if name.startswith(FOREIGN):
        return Path("runs", EVALUATIONS, re.sub(r"[^\w.-]+", "_", name).strip("_"))
    return holder(name) / EVALUATIONS


def config(overrides: Sequence[str], config_dir: str | None = None) -> tuple[DictConfig, str, list[Path]]:
    """Compose ``conf/evaluate.yaml``; a run is evaluated on its own data unless others are named.

    Args:
        overrides: as on the command line.
        config_dir: a folder of one's own, laid out like ``conf/``.

    Returns:
        The config, what the data are called, and the class files that are at hand.

    Raises:
        ConfigError: an override names an option or a value that does not exist; the nearest valid name is given.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    model = given.get("model", "")
    of_run = "data" not in given and bool(model) and not model.startswith(FOREIGN)
    of_data = [override for override in overrides if of_run and override.lstrip("+~").startswith("data.")]
    chosen = [f"evaluate{o[4:]}" if o.startswith("eval=") else o for o in overrides if o not in of_data]
    try:
        cfg = compose(chosen, config_dir=config_dir, root="evaluate")
    except ConfigError as error:
        raise ConfigError([fault.replace("evaluate has no", "eval has no") for fault in error.faults]) from error
    if of_run:
        run = load_run(run_folder(model, "model"), of_data)
        own: Any = OmegaConf.to_container(run.data, resolve=False)
        cfg.data = own | {"batch_size": 1, "clusters": None}
    roots = [CONF, *([Path(config_dir)] if config_dir else [])]
    files = [path for root in roots for path in sorted((root / "eval" / "classes").glob("*.yaml"))]
    return cfg, "own" if of_run else given.get("data", "emoji"), files


def _entry(number: Number) -> dict[str, Any]:
    return {
        "value": number.value,
        "chance": number.chance,
        "protocol": number.protocol,
        "protocol_hash": number.hash,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"repr": version("repr-pretrain")} | {name: version(name) for name in ("torch", "timm", "open_clip_torch")}
