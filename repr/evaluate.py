"""Evaluate any encoder by the published protocols: ``python -m repr.evaluate model=MODEL [data=...] [eval=[knn,...]]``.

``metrics.json`` in the folder that ``out`` names, or ``<run folder>/evaluation/<data>-<protocol hash>/``, holds::

    {
      "format": 1,
      "protocol_hash": "3f0c9a1b",          # of everything below "protocol" of all numbers, and of what was asked for
      "model": {"name": ..., "hash": ...},   # the hash is of the weights and the architecture
      "data": {"name": "emoji", "sets": {"bank": {"rows": 5610, "unread": 0, "hash": ...}, "val": ...}},
      "results": {
        "val/knn_category_k20_t0.07": {
          "value": 0.61, "chance": 0.19,     # chance: null where there is no such level
          "protocol": {"eval": "knn", "resolution": 224, "resize": ..., "crop": ..., "mean": ..., "k": 20, ...},
          "protocol_hash": "9ce0d5b2"        # of that protocol: equal hashes may be compared
        }, ...
      },
      "left_out": {"val/zero_shot": "why"},  # what was asked for and not computed, or computed on fewer rows
      "notes": ["..."],
      "versions": {"repr": ..., "torch": ..., "timm": ..., "open_clip_torch": ...}
    }
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from repr.config import CONF, ConfigError, check, compose, load_run
from repr.files import replacing
from repr.fit import is_first, user_message

if TYPE_CHECKING:
    from repr.models.foreign import Encoder
    from repr.protocols import Number

METRICS = "metrics.json"
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
    from repr.evaluation_plan import make_plan
    from repr.feature_tables import FeatureTables, check_dtype, short_hash
    from repr.protocols import compute, finetuned
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
    with replacing(out / METRICS) as file:
        file.write(json.dumps(found, indent=1).encode())
    save_exhibits(out, shown, {name: data.evaluated(name)[0] for name in data.eval_names})
    return found | {"folder": out}


def read_encoder(name: str, image_size: int | None) -> Encoder:
    """Any encoder.

    Args:
        name: a run folder, a checkpoint inside one, or what :func:`repr.models.foreign.read_foreign` takes.
        image_size: side in pixels; None: its own.

    Raises:
        ConfigError: there is none.
        ValueError: it cannot take pictures of that size.
    """
    from functools import partial

    from hydra.utils import instantiate

    from repr.data.views import evaluation_view
    from repr.export.folders import stage_folders
    from repr.export.trained import Trained
    from repr.models.foreign import HINT, Encoder, check_size, read_foreign, resize

    if name.startswith(FOREIGN):
        return read_foreign(name, image_size)
    if not Path(name).exists():
        raise ConfigError([f"model={name} does not exist; {HINT}"])
    if stages := stage_folders(name):
        from repr.stages import load_joined

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
        return Path("runs", "evaluation", re.sub(r"[^\w.-]+", "_", name).strip("_"))
    path = Path(name)
    return (path.parent.parent if path.is_file() else path) / "evaluation"


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
        folder = _run_folder(model)
        run = load_run(folder, of_data)
        own: Any = OmegaConf.to_container(run.data, resolve=False)
        cfg.data = own | {"batch_size": 1, "clusters": None}
    roots = [CONF, *([Path(config_dir)] if config_dir else [])]
    files = [path for root in roots for path in sorted((root / "eval" / "classes").glob("*.yaml"))]
    return cfg, "own" if of_run else given.get("data", "emoji"), files


def _run_folder(model: str) -> Path:
    """The folder that holds the data's config of a run.

    Raises:
        ConfigError: the model does not exist, or is no run.
    """
    from repr.models.foreign import HINT

    path = Path(model)
    folder = path.parent.parent if path.is_file() else path
    if not path.exists():
        raise ConfigError([f"model={model} does not exist; {HINT}"])
    if not (folder / "config.yaml").is_file():
        raise ConfigError([f"model={model} is not (inside) a run folder: {folder / 'config.yaml'} is missing; {HINT}"])
    return folder


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


def show(found: Mapping[str, Any]) -> None:
    """Print the numbers beside chance and the hash of their protocol, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Evaluation of {found['model']['name']}", title_justify="left", header_style="bold")
    table.add_column("number")
    for column in ("value", "chance", "protocol"):
        table.add_column(column, justify="right", style="dim" if column != "value" else None)
    for name, entry in found["results"].items():
        chance = "" if entry["chance"] is None else f"{entry['chance']:.4f}"
        table.add_row(name, f"{entry['value']:.4g}", chance, entry["protocol_hash"])
    console = Console()
    console.print(table)
    for name, why in found["left_out"].items():
        console.print(f"left out: {name}: {why}", highlight=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    print(f"protocol {found['protocol_hash']}, written: {found['folder'] / METRICS}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m repr.evaluate", description="Evaluate an encoder.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model=MODEL, data=emoji, eval=[knn], ...")
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")
    parser.add_argument("--show", action="store_true", help="print the composed config and leave")
    options = parser.parse_intermixed_args(arguments)
    try:
        cfg, data_name, class_files = config(options.overrides, options.config_dir)
        if options.show:
            print(OmegaConf.to_yaml(cfg))
            return
        check(cfg)
        found = evaluate(cfg, data_name=data_name, class_files=class_files)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")
    if found:
        show(found)


if __name__ == "__main__":
    main()
