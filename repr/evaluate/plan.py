"""What an evaluation can compute: the protocols that apply to the sets and the encoder, and the tables they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from repr.config import ConfigError
from repr.data.datamodule import DataModule
from repr.data.datasets import class_ids
from repr.data.fingerprint import captions_of
from repr.data.questions.compositional import Questions, questions
from repr.data.sources.source import has_questions
from repr.evaluate.feature_tables import FeatureTables, maps_fault
from repr.evaluate.finetune import fault as finetune_fault
from repr.metrics.classes import Classes, load_classes

PROBES = ("knn", "linear", "linear_sgd", "ridge")
NO_TEXT = "the encoder has no text tower"
OWN_TABLES = {"dense", "finetune", "lidar"}  # protocols that do not read the embeddings of whole pictures


@dataclass
class Plan:
    """What will be computed.

    Attributes:
        options: protocol -> its options.
        captions: set -> its distinct captions, and (P, 2) int64 the positions of picture and caption that belong
            together.
        classes: set -> name of a number -> its classes.
        questions: set -> what it asks.
        learned: attribute -> sets that a fine-tuned classifier of it is asked about.
        left_out: ``<set>/<what>`` -> why it is not computed.
    """

    options: dict[str, DictConfig]
    captions: dict[str, tuple[list[str], Tensor]] = field(default_factory=dict)
    classes: dict[str, dict[str, Classes]] = field(default_factory=dict)
    questions: dict[str, Questions] = field(default_factory=dict)
    learned: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def make_plan(options: Mapping[str, DictConfig], tables: FeatureTables, class_files: Sequence[Path]) -> Plan:
    """Find what each protocol can do with the data and the encoder, and ask for the tables that it needs.

    Args:
        options: protocol -> its options.
        tables: of the encoder.
        class_files: those that may name the labels of a set, where none are given.

    Raises:
        ConfigError: a class file that is given does not name all labels of its set.
    """
    data, plan = tables.data, Plan(dict(options))
    sets = data.eval_names[1:]
    if "dense" in options and (fault := maps_fault(tables.encoder)):
        plan.left_out |= {f"{name}/dense": fault for name in sets}
        del plan.options["dense"]
    if "finetune" in options:
        _plan_finetune(plan, tables)
    texts = tables.encoder.tokenizer is not None
    for name in sets if "zero_shot" in options else ():
        found = _classes(options["zero_shot"], data, name, class_files) if texts else NO_TEXT
        if isinstance(found, str):
            plan.left_out[f"{name}/zero_shot"] = found
        else:
            plan.classes[name] = found
    for name in sets if {"retrieval", "geometry", "exhibits"} & options.keys() and texts else ():
        plan.captions[name] = captions_of(*data.evaluated(name))
    for name in sets if "retrieval" in options else ():
        if not texts or not plan.captions[name][0]:
            plan.left_out[f"{name}/retrieval"] = f"{name} has no captions" if texts else NO_TEXT
    for name in sets if "compositional" in options else ():
        source = data.eval[name]
        if texts and has_questions(source):
            plan.questions[name] = questions(source)
        else:
            plan.left_out[f"{name}/compositional"] = f"{name} asks no questions" if texts else NO_TEXT
    for name in sets if "lidar" in options else ():
        if len(data.eval[name]) < 2:
            plan.left_out[f"{name}/lidar"] = f"{name} has one picture"
    for probe in (probe for probe in PROBES if probe in options):
        plan.left_out |= {f"{name}/{probe}": why for name in sets if (why := _unlabelled(data, name))}
    _want(plan, tables)
    return plan


def _want(plan: Plan, tables: FeatureTables) -> None:
    sets = tables.data.eval_names[1:]
    if plan.options.keys() - OWN_TABLES:
        bank = any(name in plan.options for name in (*PROBES, "exhibits"))
        for name in (["bank"] if bank else []) + sets:
            tables.want_pictures(name)
    for name, (texts, _) in plan.captions.items():
        if texts:
            tables.want_texts(texts, f"captions of {name}")
    for name, asked in plan.questions.items():
        tables.want_texts(asked.texts, f"candidates of {name}")
    for several in plan.classes.values():
        for classes in several.values():
            tables.want_texts(classes.sentences(), f"sentences of the classes of {classes.attribute}")
    if "dense" in plan.options:
        dense = instantiate(plan.options["dense"])
        for name in tables.data.eval_names:
            tables.want_maps(name, dense.views, dense.num_images)
    for name in with_lidar(plan, sets):
        tables.want_views(name, **lidar_views(plan, tables))


def _plan_finetune(plan: Plan, tables: FeatureTables) -> None:
    """Which attributes are learned, and on which sets they are asked for."""
    sets, wanted = tables.data.eval_names[1:], plan.options["finetune"].attributes
    fault = finetune_fault(tables.encoder)
    for name in sets:
        if why := fault or _unlabelled(tables.data, name):
            plan.left_out[f"{name}/finetune"] = why
            continue
        shared = [a for a in shared_attributes(tables.data, name) if wanted is None or a in wanted]
        for attribute in shared:
            plan.learned.setdefault(attribute, []).append(name)
        if not shared:
            plan.left_out[f"{name}/finetune"] = f"{name} has no labels of {', '.join(wanted)} that the training set has"


def _unlabelled(data: DataModule, name: str) -> str | None:
    """Why no probe can be asked about a set, or None."""
    if not _labels(data, name):
        return f"{name} has no labels"
    if not _labels(data, "bank"):
        return "the training set has no labels"
    return (
        None
        if shared_attributes(data, name)
        else f"no attribute of {name} has two classes of which the training set has one"
    )


def _labels(data: DataModule, name: str) -> dict[str, Tensor]:
    """The labels of the evaluated rows, of each attribute that some of them have."""
    source, rows = data.evaluated(name)
    ids = class_ids(source, data.attributes)[rows]
    return {attribute: ids[:, i] for i, attribute in enumerate(data.attributes) if (ids[:, i] >= 0).any()}


def shared_attributes(data: DataModule, name: str) -> list[str]:
    """Attributes with two classes or more in a set, of which the bank has at least one."""
    bank, found = _labels(data, "bank"), []
    for attribute, labels in _labels(data, name).items():
        present = set(labels.tolist()) - {-1}
        if len(present) > 1 and attribute in bank and present & set(bank[attribute].tolist()):
            found.append(attribute)
    return found


def _classes(options: DictConfig, data: DataModule, name: str, class_files: Sequence[Path]) -> dict[str, Classes] | str:
    """The class files of a set, or why it has none.

    Raises:
        ConfigError: a file that is given does not name all labels of the set.
    """
    given = (options.get("classes") or {}).get(name)
    if given is not None:
        several = load_classes(given if isinstance(given, str) else OmegaConf.to_container(given))  # type: ignore[arg-type]
        for classes in several.values():
            if fault := _names_fault(classes, data, name):
                raise ConfigError([f"eval.zero_shot.classes.{name}: {fault}"])
        return several
    fitting = [str(path) for path in class_files if _names_fault(Classes.load(path), data, name) is None]
    if not fitting:
        return f"no class file names the labels of {name}: set eval.zero_shot.classes.{name} to one"
    return load_classes(fitting[0] if len(fitting) == 1 else fitting)


def _names_fault(classes: Classes, data: DataModule, name: str) -> str | None:
    """Why classes are not those of a set, or None; they may be more than there are in the set."""
    labels = _labels(data, name)
    if classes.attribute not in labels:
        return f"{name} has no labels of '{classes.attribute}'; it has {', '.join(labels) or 'none'}"
    vocabulary = data.attributes[classes.attribute]
    present = [vocabulary[label] for label in sorted(set(labels[classes.attribute].tolist()) - {-1})]
    if unknown := [label for label in present if label not in classes.names]:
        return f"the class file lacks {len(unknown)} of the {len(present)} labels of {name}, such as '{unknown[0]}'"
    return None


def with_lidar(plan: Plan, sets: Sequence[str]) -> list[str]:
    """Those of some sets whose LiDAR is computed."""
    return [name for name in sets if "lidar" in plan.options and f"{name}/lidar" not in plan.left_out]


def lidar_views(plan: Plan, tables: FeatureTables) -> dict[str, Any]:
    """Which views LiDAR compares, for :meth:`repr.evaluate.feature_tables.FeatureTables.want_views`."""
    options = plan.options["lidar"]
    view, numbers = instantiate(options.view), (options.num_samples, options.num_views)
    return {"view": view, "num_samples": numbers[0], "num_views": numbers[1], "seed": tables.cfg.seed}
