"""Evaluate any encoder by the published protocols."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from repr.cli import is_first
from repr.config import CONF, ConfigError, compose
from repr.files import replacing
from repr.runs.folder import ENCODER, EVALUATION, EVALUATIONS, holder, load_run, run_folder
from repr.runs.inputs import data_module

if TYPE_CHECKING:
    from repr.evaluate.encoder import Encoder
FOREIGN = ("open_clip:", "timm:")


def evaluate(cfg: DictConfig, *, data_name: str = "data", class_files: Sequence[Path] = ()) -> dict[str, Any]:
    """Evaluate an encoder, on one process or on those of ``cfg.trainer``.

    Args:
        cfg: from :func:`config`, checked.
        data_name: what the data are called.
        class_files: from :func:`config`, for zero-shot classification of sets that name none.

    Returns:
        On the first process what ``metrics.json`` holds, and its ``folder``; on the others nothing.

    Raises:
        ConfigError: there is no such model or protocol, or a class file does not fit.
        ValueError: it cannot take pictures of that size; too many rows of a set cannot be read.
    """
    from repr.distributed import rank
    from repr.evaluate.protocol import check_protocols, compute, plan, read_protocols
    from repr.evaluate.stored_tables import StoredTables
    from repr.evaluate.tables import short_hash
    from repr.report.exhibits import save_exhibits

    if cfg.features not in ("float32", "bfloat16"):
        raise ConfigError([f"features={cfg.features}; set it to float32 or bfloat16"])
    if not cfg.data.eval:
        raise ConfigError(["data.eval names no set to evaluate on: add one, as in README, 'Your own data'"])
    check_protocols(cfg.get("eval") or {})
    encoder = read_encoder(cfg.model, cfg.image_size, trust=cfg.trust)
    cfg = cfg.copy()
    cfg.image_size = encoder.image_size
    cfg.data.update({"mean": list(encoder.mean), "std": list(encoder.std)})
    asked: Any = OmegaConf.to_container(cfg.get("eval") or OmegaConf.create(), resolve=True)
    protocols = read_protocols(asked)
    data = data_module(cfg)
    foreign_folder = Path("runs", EVALUATIONS, re.sub(r"[^\w.-]+", "_", cfg.model).strip("_"))
    folder = foreign_folder if cfg.model.startswith(FOREIGN) else holder(cfg.model) / EVALUATIONS
    cfg.run_folder = str(folder)
    tables = StoredTables(encoder, data, cfg, Path(cfg.cache or folder / "features"), class_files)
    planned = plan(protocols, tables)
    tables.extract()
    for protocol in protocols.values():
        protocol.prepare(tables)
    if rank() or not is_first():
        return {}
    numbers, shown = compute(planned, tables)
    protocol_hash = short_hash([tables.taken, asked, sorted({number.hash for number in numbers.values()})])
    out = Path(cfg.out) if cfg.out else folder / f"{data_name}-{protocol_hash}"
    written = {
        "format": 1,
        "protocol_hash": protocol_hash,
        "model": {"name": str(cfg.model), "hash": tables.model_hash},
        "data": {"name": data_name, "sets": tables.told()},
        "results": {name: {**vars(number), "protocol_hash": number.hash} for name, number in numbers.items()},
        "left_out": tables.left_out,
        "notes": list(encoder.notes),
        "versions": {"repr": version("repr-pretrain")}
        | {name: version(name) for name in ("torch", "timm", "open_clip_torch")},
    }
    with replacing(out / EVALUATION) as file:
        file.write(json.dumps(written, indent=1).encode())
    save_exhibits(out, shown, {name: data.evaluated(name)[0] for name in data.eval_names})
    return written | {"folder": out}


def class_files_of(run: DictConfig) -> dict[str, Any]:
    """Set -> class files, as the config of a run has them for zero-shot classification."""
    classes = OmegaConf.select(run, "eval.zero_shot.classes")
    known: Any = OmegaConf.to_container(classes, resolve=True) if OmegaConf.is_dict(classes) else {}
    return {name: files for name, files in known.items() if name in run.data.eval}


def read_encoder(name: str, image_size: int | None, *, trust: bool = False) -> Encoder:
    """Read an encoder, for pictures of ``image_size`` pixels or, with None, of its own size.

    ``name`` is a run folder, a checkpoint inside one, or what :func:`repr.evaluate.foreign.read_foreign` takes; for
    ``trust`` see :func:`repr.runs.folder.load_run`.

    Raises:
        ConfigError: there is no such encoder.
        ValueError: it cannot take pictures of that size.
    """
    from hydra.utils import instantiate

    from repr.evaluate.encoder import Encoder, set_size
    from repr.evaluate.foreign import HINT, read_foreign
    from repr.runs.folder import stage_folders
    from repr.runs.trained import Trained

    if name.startswith(FOREIGN):
        return read_foreign(name, image_size)
    if not Path(name).exists():
        raise ConfigError([f"model={name} does not exist; {HINT}"])
    if stages := stage_folders(name):
        from repr.runs.joined import load_joined

        module: Any = load_joined(name, trust=trust)
        run = load_run(next(iter(stages.values())), trust=trust, built=ENCODER)
    else:
        trained = Trained.read(name, trust=trust)
        module, run = trained.objective, trained.cfg
    size = image_size or run.data.image_size
    set_size(module, size, name, own=None if stages else run.data.image_size)
    tokenizer = instantiate(run.tokenizer) if run.get("tokenizer") else None
    return Encoder.of_objective(module, size, run.data.mean, run.data.std, tokenizer)


def config(overrides: Sequence[str], config_dir: str | None = None) -> tuple[DictConfig, str, list[Path]]:
    """Compose ``conf/evaluate.yaml`` with overrides and a user's folder of configs, as :func:`repr.config.compose`.

    A run is evaluated on its own data unless others are named.

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
        run = load_run(run_folder(model, "model"), of_data, trust=cfg.trust, built=ENCODER)
        own: Any = OmegaConf.to_container(run.data, resolve=False)
        of_training = ("clusters", "lanes", "neighbours", "hard_captions", "distorted_captions")
        cfg.data = own | dict.fromkeys(of_training) | {"batch_size": 1}
        if (cfg.get("eval") or {}).get("zero_shot"):  # what is given here comes first
            cfg.eval.zero_shot.classes = {**class_files_of(run), **(cfg.eval.zero_shot.classes or {})}
    roots = [CONF, *([Path(config_dir)] if config_dir else [])]
    files = [path for root in roots for path in sorted((root / "eval" / "classes").glob("*.yaml"))]
    return cfg, "own" if of_run else given.get("data", "emoji"), files
