"""What each protocol of `repr.evaluate` needs, and the numbers that it gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from repr.batch import Features
from repr.callbacks.evaluation import CHANCE
from repr.config import ConfigError
from repr.data.compositional import Questions, has_questions, questions
from repr.data.datamodule import DataModule
from repr.data.datasets import class_ids
from repr.data.fingerprint import captions_of
from repr.feature_tables import FeatureTables, maps_fault, short_hash
from repr.finetune import fault as finetune_fault
from repr.finetune import finetune
from repr.metrics.classes import Classes, load_classes
from repr.metrics.exhibits import Exhibits, NamedClasses
from repr.metrics.knn import sweep_name
from repr.metrics.tables import one_caption
from repr.metrics.zero_shot import average_templates, zero_shot

PROBES = ("knn", "linear", "linear_sgd", "ridge")
SAID: dict[str, dict[str, Any]] = {  # what the options of a protocol do not say
    "knn": {"features": "trunk", "similarity": "cosine", "vote": "exp(cosine / temperature)"},
    "linear": {"features": "trunk", "solver": "L-BFGS", "model": "multinomial logistic regression"},
    "linear_sgd": {"features": "trunk", "solver": "SGD", "schedule": "cosine", "weight_decay": 0.0},
    "ridge": {"features": "trunk, standardised", "solver": "closed form", "penalty": "best of leave-one-out"},
    "zero_shot": {"features": "image", "similarity": "cosine", "class": "mean of the templates' unit embeddings"},
    "retrieval": {"features": "image, text", "similarity": "cosine", "ties": "count as failures"},
    "geometry": {"features": "image, text (the first caption)"},
    "dense": {"features": "maps"},
    "finetune": {"optimizer": "AdamW", "schedule": "cosine", "trained": "all weights and a linear classifier"},
    "compositional": {"features": "image, text", "similarity": "cosine", "ties": "count as failures"},
}
NO_TEXT = "the encoder has no text tower"
OWN_TABLES = {"dense", "finetune", "lidar"}  # protocols that do not read the embeddings of whole pictures
# Options that no number depends on, or told otherwise.
NO_EFFECT = ("_target_", "_partial_", "memory", "classes", "attributes")


@dataclass(frozen=True)
class Number:
    """One number of an evaluation, with how it came about."""

    value: float
    chance: float | None
    protocol: dict[str, Any]

    @property
    def hash(self) -> str:
        """Of the protocol."""
        return short_hash(self.protocol)


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
    for name in _with_lidar(plan, sets):
        tables.want_views(name, **_lidar_views(plan, tables))


def _plan_finetune(plan: Plan, tables: FeatureTables) -> None:
    """Which attributes are learned, and on which sets they are asked for."""
    sets, wanted = tables.data.eval_names[1:], plan.options["finetune"].attributes
    fault = finetune_fault(tables.encoder)
    for name in sets:
        if why := fault or _unlabelled(tables.data, name):
            plan.left_out[f"{name}/finetune"] = why
            continue
        shared = [a for a in _shared(tables.data, name) if wanted is None or a in wanted]
        for attribute in shared:
            plan.learned.setdefault(attribute, []).append(name)
        if not shared:
            plan.left_out[f"{name}/finetune"] = f"{name} has no labels of {', '.join(wanted)} that the training set has"


def finetuned(plan: Plan, tables: FeatureTables) -> dict[str, Number]:
    """The numbers of fine-tuning; every rank must call it, and the first has them."""
    numbers: dict[str, Number] = {}
    for attribute, sets in plan.learned.items():
        protocol = _protocol(plan, tables, "finetune", seed=tables.cfg.seed, views=_views(tables))
        for name, values in finetune(tables.cfg, tables.encoder, tables.data, attribute, sets).items():
            key = f"finetune_{attribute}"
            numbers[f"{name}/{key}"] = Number(values[key], values[key + CHANCE], protocol)
    return numbers


def _views(tables: FeatureTables) -> Any:
    return OmegaConf.to_container(tables.cfg.views, resolve=True)


def _unlabelled(data: DataModule, name: str) -> str | None:
    """Why no probe can be asked about a set, or None."""
    if not _labels(data, name):
        return f"{name} has no labels"
    if not _labels(data, "bank"):
        return "the training set has no labels"
    return None if _shared(data, name) else f"no attribute of {name} has two classes of which the training set has one"


def _labels(data: DataModule, name: str) -> dict[str, Tensor]:
    """The labels of the evaluated rows, of each attribute that some of them have."""
    source, rows = data.evaluated(name)
    ids = class_ids(source, data.attributes)[rows]
    return {attribute: ids[:, i] for i, attribute in enumerate(data.attributes) if (ids[:, i] >= 0).any()}


def _shared(data: DataModule, name: str) -> list[str]:
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


@torch.no_grad()
def compute(plan: Plan, tables: FeatureTables) -> tuple[dict[str, Number], dict[str, Exhibits]]:
    """All numbers of a plan whose tables were extracted, ``<set>/<metric>`` -> number; and set -> exhibits.

    Rows that could not be read, and pictures without caption in retrieval, are left out; the plan then says so.
    """
    numbers: dict[str, Number] = {}
    shown: dict[str, Exhibits] = {}
    probes = [probe for probe in PROBES if probe in plan.options]
    bank = tables.pictures("bank") if probes or "exhibits" in plan.options else None
    for name in tables.data.eval_names[1:]:
        found: list[tuple[dict[str, float], dict[str, Any]]] = []
        if plan.options.keys() - OWN_TABLES:
            query = tables.pictures(name)
            for probe in probes:
                found += _probed(plan, tables, probe, name, bank, query)
            captions = _captioned(plan, tables, name, query)
            found += _text_numbers(plan, tables, name, query, captions)
            if "exhibits" in plan.options:
                shown[name] = _exhibits(plan, tables, name, bank, query, captions)
        if "dense" in plan.options:
            found += _dense(plan, tables, name)
        for _ in _with_lidar(plan, [name]):
            found += _lidar(plan, tables, name)
        for values, protocol in found:
            for key, value in values.items():
                if not key.endswith(CHANCE):
                    numbers[f"{name}/{key}"] = Number(value, values.get(key + CHANCE), protocol)
    return numbers, shown


Found = Iterator[tuple[dict[str, float], dict[str, Any]]]  # values with their chances, and the protocol of all


def _protocol(plan: Plan, tables: FeatureTables, name: str, **more: Any) -> dict[str, Any]:
    told: Any = OmegaConf.to_container(plan.options[name], resolve=True)
    told = {key: value for key, value in told.items() if key not in NO_EFFECT}
    return {"eval": name, **tables.taken, **SAID[name], **told, **more}


def _probed(plan: Plan, tables: FeatureTables, probe: str, name: str, bank: Any, query: Features) -> Found:
    metric = instantiate(plan.options[probe])
    seed = {} if probe in ("knn", "ridge") else {"seed": tables.cfg.seed}
    protocol = _protocol(plan, tables, probe, bank=tables.data.bank_size, **seed)
    for attribute in _shared(tables.data, name):
        for pooling in (None, *query.poolings):
            pair = [t if pooling is None else replace(t, trunk=t.poolings[pooling]) for t in (bank, query)]
            prefix = "" if pooling is None else f"{pooling}_"
            told = protocol | ({} if pooling is None else {"features": pooling})
            values = {prefix + k: v for k, v in metric(*pair, attribute=attribute, **seed).items()}
            if probe != "knn":
                yield values, told
                continue
            for k in plan.options[probe].ks:
                for temperature in plan.options[probe].temperatures:
                    key = prefix + sweep_name(attribute, k, temperature)
                    own = {n: v for n, v in values.items() if n in (key, key + CHANCE)}
                    single = {n: v for n, v in told.items() if n not in ("ks", "temperatures")}
                    yield own, single | {"k": k, "temperature": temperature}


def _text_numbers(plan: Plan, tables: FeatureTables, name: str, query: Features, captions: Features | None) -> Found:
    if "retrieval" in plan.options and captions is not None:
        values = instantiate(plan.options["retrieval"])(query, captions)
        yield values, _protocol(plan, tables, "retrieval", **_tokens(tables))
    if "geometry" in plan.options:
        table = query if captions is None else one_caption(captions)
        told = {} if captions is None else _tokens(tables)
        values = instantiate(plan.options["geometry"])(query, table)
        yield values, _protocol(plan, tables, "geometry", **told)
    for kind, classes in plan.classes.get(name, {}).items():
        told = {"attribute": classes.attribute, "num_classes": len(classes.names), "templates": classes.templates}
        told |= {"classes": short_hash(list(classes.names.values())), **_tokens(tables)}
        embeddings, ids = _named(tables, classes)
        values = zero_shot(
            query,
            query,
            attribute=classes.attribute,
            class_embeddings=embeddings,
            class_labels=ids,
            ks=list(plan.options["zero_shot"].ks),
            name=kind,
        )
        yield values, _protocol(plan, tables, "zero_shot", **told)
    if (asked := plan.questions.get(name)) is not None:
        values = instantiate(plan.options["compositional"])(
            query,
            query,
            captions=tables.texts(asked.texts),
            candidates=asked.candidates,
            items=asked.items,
            attribute=asked.split,
            names=tables.data.attributes[asked.split],
        )
        yield values, _protocol(plan, tables, "compositional", **_tokens(tables))


def _tokens(tables: FeatureTables) -> dict[str, Any]:
    tokenizer: Any = tables.encoder.tokenizer
    return {"tokenizer": type(tokenizer).__name__, "context_length": getattr(tokenizer, "context_length", None)}


def _captioned(plan: Plan, tables: FeatureTables, name: str, query: Features) -> Features | None:
    """The rows that have captions, with all of them; None where there are none."""
    texts, pairs = plan.captions.get(name, ([], torch.empty(0, 2)))
    if not texts:
        return None
    read = tables.read(name)
    place = torch.full((len(read),), -1)  # position in the set -> row of the table
    place[read] = torch.arange(int(read.sum()))
    pairs = torch.stack([place[pairs[:, 0]], pairs[:, 1]], 1)
    rows, image_row = pairs[pairs[:, 0] >= 0, 0].unique(return_inverse=True)
    kept, text_row = pairs[pairs[:, 0] >= 0, 1].unique(return_inverse=True)
    if missing := len(query.image) - len(rows):
        plan.left_out[f"{name}/retrieval"] = f"{missing} of {len(query.image)} pictures have no caption"
    rows, pairs = rows.to(tables.device), torch.stack([image_row, text_row], 1).to(tables.device)
    text = tables.texts(texts)[kept.to(tables.device)]
    return Features(query.index[rows], query.image[rows], query.trunk[rows], text=text, pairs=pairs)


def _named(tables: FeatureTables, classes: Classes) -> tuple[Tensor, Tensor]:
    """Class embeddings (C, D) and their labels (C,); classes that the data do not have are candidates all the same."""
    vocabulary = tables.data.attributes[classes.attribute]
    position = {label: i for i, label in enumerate(vocabulary)}
    ids = [position.get(label, len(vocabulary) + i) for i, label in enumerate(classes.names)]
    embeddings = tables.texts(classes.sentences()).unflatten(0, (len(classes.names), len(classes.templates)))
    return average_templates(embeddings), torch.tensor(ids, device=embeddings.device)


def _exhibits(
    plan: Plan, tables: FeatureTables, name: str, bank: Any, query: Features, captions: Features | None
) -> Exhibits:
    known = {
        kind: NamedClasses(classes.attribute, *_named(tables, classes), names=list(classes.names.values()))
        for kind, classes in plan.classes.get(name, {}).items()
    }
    # Only where every picture has a caption do both tables have the same rows.
    whole = captions is not None and len(captions.image) == len(query.image)
    table = replace(query, text=captions.text, pairs=captions.pairs) if captions is not None and whole else query
    attributes = tables.data.attributes
    return instantiate(plan.options["exhibits"])(bank, table, attributes=attributes, classes=known)


def _dense(plan: Plan, tables: FeatureTables, name: str) -> Found:
    dense = instantiate(plan.options["dense"])
    options = {"views": dense.views, "num_images": dense.num_images}
    bank, query = (tables.maps(which, **options) for which in ("bank", name))
    shared = {key: value for key, value in _protocol(plan, tables, "dense").items() if key != "metrics"}
    # Crops and masks are cut by one code for every encoder, whatever its own transform.
    shared |= {"resize": "shorter side to the resolution", "crop": "centre", "interpolation": "bicubic"}
    for kind, metric in dense.metrics.items():
        told: Any = OmegaConf.to_container(plan.options["dense"].metrics[kind], resolve=True)
        told = {key: value for key, value in told.items() if key not in NO_EFFECT}
        yield metric(bank, query), shared | {"dense": kind} | told


def _with_lidar(plan: Plan, sets: Sequence[str]) -> list[str]:
    return [name for name in sets if "lidar" in plan.options and f"{name}/lidar" not in plan.left_out]


def _lidar_views(plan: Plan, tables: FeatureTables) -> dict[str, Any]:
    options = plan.options["lidar"]
    view, numbers = instantiate(options.view), (options.num_samples, options.num_views)
    return {"view": view, "num_samples": numbers[0], "num_views": numbers[1], "seed": tables.cfg.seed}


def _lidar(plan: Plan, tables: FeatureTables, name: str) -> Found:
    options: Any = OmegaConf.to_container(plan.options["lidar"], resolve=True)
    metric, found = instantiate(plan.options["lidar"].metric), tables.views(name, **_lidar_views(plan, tables))
    # Views are cut by one code for every encoder, whatever its own transform.
    taken = tables.taken | {"resize": "none", "crop": "drawn", "interpolation": "bicubic"}
    view = {key: value for key, value in options["view"].items() if key not in NO_EFFECT}
    own = {"view": view, "num_samples": len(found["image"]), "num_views": options["num_views"]}
    own |= {"delta": options["metric"]["delta"], "seed": tables.cfg.seed}
    for features, views in found.items():
        yield {f"lidar_{features}": metric(views)}, {"eval": "lidar", **taken, "features": features, **own}
