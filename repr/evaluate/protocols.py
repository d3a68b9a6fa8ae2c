"""The numbers that each protocol of `repr.evaluate` gives, with how they came about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from repr.evaluate.during_training import CHANCE
from repr.evaluate.feature_tables import FeatureTables, short_hash
from repr.evaluate.finetune import finetune
from repr.evaluate.plan import OWN_TABLES, PROBES, Plan, lidar_views, shared_attributes, with_lidar
from repr.metrics.classes import Classes
from repr.metrics.exhibits import Exhibits, NamedClasses
from repr.metrics.features import Features
from repr.metrics.knn import sweep_name
from repr.metrics.tables import one_caption
from repr.metrics.zero_shot import average_templates, zero_shot

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
# Options that no number depends on, or that are told otherwise.
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
        for _ in with_lidar(plan, [name]):
            found += _lidar(plan, tables, name)
        for values, protocol in found:
            for key, value in values.items():
                if not key.endswith(CHANCE):
                    numbers[f"{name}/{key}"] = Number(value, values.get(key + CHANCE), protocol)
    return numbers, shown


def finetuned(plan: Plan, tables: FeatureTables) -> dict[str, Number]:
    """The numbers of fine-tuning; every rank must call it, and the first has them."""
    numbers: dict[str, Number] = {}
    for attribute, sets in plan.learned.items():
        views = OmegaConf.to_container(tables.cfg.views, resolve=True)
        protocol = _protocol(plan, tables, "finetune", seed=tables.cfg.seed, views=views)
        for name, values in finetune(tables.cfg, tables.encoder, tables.data, attribute, sets).items():
            key = f"finetune_{attribute}"
            numbers[f"{name}/{key}"] = Number(values[key], values[key + CHANCE], protocol)
    return numbers


Found = Iterator[tuple[dict[str, float], dict[str, Any]]]  # values with their chances, and the protocol of all


def _protocol(plan: Plan, tables: FeatureTables, name: str, **more: Any) -> dict[str, Any]:
    told: Any = OmegaConf.to_container(plan.options[name], resolve=True)
    told = {key: value for key, value in told.items() if key not in NO_EFFECT}
    return {"eval": name, **tables.taken, **SAID[name], **told, **more}


def _probed(plan: Plan, tables: FeatureTables, probe: str, name: str, bank: Any, query: Features) -> Found:
    metric = instantiate(plan.options[probe])
    seed = {} if probe in ("knn", "ridge") else {"seed": tables.cfg.seed}
    protocol = _protocol(plan, tables, probe, bank=tables.data.bank_size, **seed)
    for attribute in shared_attributes(tables.data, name):
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
    if asked := plan.questions.get(name):
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


def _lidar(plan: Plan, tables: FeatureTables, name: str) -> Found:
    options: Any = OmegaConf.to_container(plan.options["lidar"], resolve=True)
    metric, found = instantiate(plan.options["lidar"].metric), tables.views(name, **lidar_views(plan, tables))
    # Views are cut by one code for every encoder, whatever its own transform.
    taken = tables.taken | {"resize": "none", "crop": "drawn", "interpolation": "bicubic"}
    view = {key: value for key, value in options["view"].items() if key not in NO_EFFECT}
    own = {"view": view, "num_samples": len(found["image"]), "num_views": options["num_views"]}
    own |= {"delta": options["metric"]["delta"], "seed": tables.cfg.seed}
    for features, views in found.items():
        yield {f"lidar_{features}": metric(views)}, {"eval": "lidar", **taken, "features": features, **own}
