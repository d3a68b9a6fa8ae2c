"""The model card of an export: ``README.md`` as the hub of Hugging Face reads it, filled from the run."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from repr.metrics.classes import load_classes
from repr.runs.folder import load_evaluations, load_results
from repr.runs.trained import Trained

AFTER_FIT = "end of the run"
RECIPE = ("objective", "optim", "data", "trainer")  # parts of a config; data holds the views, objective the towers
LICENSE = (
    "# license: yours to choose, one of hf.co/docs/hub/repositories-licenses; mind the licences of the data\n"
    "# and of the weights that training began with\n"
)
TOLD = {  # of weights that are not simply the trained ones
    "teacher": "those of the teacher, the moving average of the trained ones",
    "average": "the average that was kept of the trained ones",
    "unaveraged": "the trained ones, and not the average that was kept of them",
}
USE = {
    "open_clip": """\
import open_clip
from PIL import Image

name = "hf-hub:USER/NAME"  # or local-dir:FOLDER
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
images = preprocess(Image.open("picture.jpg").convert("RGB")).unsqueeze(0)
image = model.eval().encode_image(images, normalize=True)
similarity = image @ model.encode_text(tokenizer(["a cat"]), normalize=True).T
""",
    "timm": """\
import timm
from PIL import Image

model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or local-dir:FOLDER
preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(preprocess(Image.open("picture.jpg").convert("RGB")).unsqueeze(0))
""",
    "stages": """\
import sys

from huggingface_hub import snapshot_download
from PIL import Image

sys.path.insert(0, snapshot_download("USER/NAME"))  # or the folder itself
from join import load

model, preprocess, tokenizer = load()
features = model.encode_image(preprocess(Image.open("picture.jpg").convert("RGB")).unsqueeze(0))
""",
}


def write(trained: Trained, folder: Path, library: str, *, num_stages: int = 0) -> None:
    """Write ``README.md``; the licence is left open.

    Args:
        trained: the objective, of several stages the last.
        folder: of the export.
        library: ``open_clip`` or ``timm``, which reads it.
        num_stages: of multistage learning; 0: one model.
    """
    from huggingface_hub import ModelCardData

    cfg = trained.cfg
    has_text = trained.has_text and library == "open_clip"
    data = ModelCardData(
        library_name=library,
        pipeline_tag="zero-shot-image-classification" if has_text else "image-feature-extraction",
        tags=["representation-learning", "repr-pretrain", type(trained.objective).__name__.lower()],
    )
    recipe = {name: _shortened(OmegaConf.to_container(cfg[name], resolve=True)) for name in RECIPE}
    recipe["objective"].pop("optim", None)  # which stands beside it, as the sets do below
    recipe["data"].pop("eval", None)
    lines = [
        f"---\n{data.to_yaml()}\n{LICENSE}---\n\n# {cfg.name}-{cfg.backbone.get('name', 'encoder')}\n",
        *_about(trained, library, num_stages),
        f"\n## Use\n\n```python\n{USE['stages' if num_stages else library]}```",
        f"\n## Recipe\n\nSeed {cfg.seed}. Paths are shortened to their last name.\n",
        "<details><summary>All options</summary>\n",
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(recipe))}```\n\n</details>",
        "\n## Evaluation\n",
        *_evaluation(trained),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _about(trained: Trained, library: str, num_stages: int) -> Iterator[str]:
    """What was trained, how, on what."""
    cfg, objective = trained.cfg, trained.objective
    towers = f"An image encoder ({cfg.backbone.get('name')}, {_millions(objective.backbone)} M parameters)"
    if trained.has_text and library == "open_clip":
        towers += f" and a text encoder ({_millions(objective.text)} M parameters)"
    stages = f" in {num_stages} stages of multistage learning, each a model of its own" if num_stages else ""
    weights = f"; the weights are {TOLD[trained.weights]}" if trained.weights in TOLD else ""
    yield f"{towers}, trained with [repr](https://pypi.org/project/repr-pretrain){stages}{weights}."
    yield ""
    doc = inspect.getdoc(type(objective)) or ""
    summary = doc.partition("\n")[0]
    methods = next((part for part in doc.split("\n\n") if part.startswith("Method")), "")
    batch = cfg.data.batch_size * cfg.trainer.get("accumulate_grad_batches", 1)
    length = f"{cfg.trainer.max_epochs} epochs" if cfg.trainer.get("max_epochs") else f"{cfg.trainer.max_steps} steps"
    pretrained = "the pretrained weights of timm" if cfg.backbone.get("pretrained") else None
    kept = {"backbone"} if library == "timm" else {"backbone", "image_projection", "text"}
    others = [(name, [*part.parameters()]) for name, part in objective.named_children() if name not in kept]
    facts = {
        "Objective": f"`{type(objective).__name__}`: {summary} {' '.join(methods.split())}",
        "Weights of its terms": ", ".join(f"{name} {weight:g}" for name, weight in objective.weights.items()),
        "Data": _source(cfg.data.train),
        "Images": f"{cfg.data.image_size} x {cfg.data.image_size} pixels, RGB",
        "Recipe": f"{length} of batches of {batch}, {cfg.optim.get('name', 'adamw')} with rate {cfg.optim.lr:g}",
        "Began with": _shortened(cfg.get("init_from")) or pretrained,
        "Not included": ", ".join(name for name, parameters in others if parameters),
    }
    yield from (f"- **{name}**: {fact}" for name, fact in facts.items() if fact)


def _millions(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}"


def _evaluation(trained: Trained) -> Iterator[str]:
    """The numbers of these weights, a column a set, then what the sets and the protocols are."""
    found = [] if trained.run is None else _numbers(trained.run, trained.name)
    if not found:
        yield "These weights were not evaluated by the run that they come from."
        return
    protocols = list(dict.fromkeys(protocol for _, _, _, protocol in found if protocol))
    sets = list(dict.fromkeys(of_set for of_set, _, _, _ in found))
    rows: dict[tuple[str, str], dict[str, str]] = {}  # metric, protocol -> set -> value and chance
    for of_set, metric, value, protocol in found:
        named = str(protocols.index(protocol) + 1) if protocol else AFTER_FIT
        rows.setdefault((metric, named), {})[of_set] = value
    yield "In brackets the level at chance.\n"
    yield f"| metric | {' | '.join(map(_cell, sets))} | protocol |\n|---|{'---:|' * len(sets)}---|"
    for (metric, named), values in rows.items():
        yield f"| {_cell(metric)} | {' | '.join(values.get(of_set, '') for of_set in sets)} | {named} |"
    if nodes := trained.cfg.data.get("eval"):
        yield "\nSets: " + "; ".join(f"`{name}`: {_source(node)}" for name, node in nodes.items()) + "."
    common = [part for part in protocols[0] if all(part in other for other in protocols[1:])] if protocols[1:] else []
    if protocols:
        yield f"\nProtocols{', all with ' if common else ''}{', '.join(common)}:\n"
    for number, protocol in enumerate(protocols, start=1):
        yield f"{number}. {', '.join(part for part in protocol if part not in common)}"
    if any(named == AFTER_FIT for _, named in rows):
        yield from _protocols(trained.cfg)


def _numbers(run: Path, checkpoint: str) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Set, metric, value with chance, and options of the protocol of every finite number.

    Those of the run's end, which have no options here, are left out where ``repr.evaluate`` has given them again.
    """
    found = []
    for _, evaluation in sorted(load_evaluations(run).items()):
        if Path(evaluation["model"]["name"]).name not in (run.name, Path(checkpoint).name):
            continue  # of another checkpoint of the run
        data = "" if evaluation["data"]["name"] == "own" else f"{evaluation['data']['name']}/"
        for name, result in evaluation["results"].items():
            protocol = tuple(" ".join(f"{key}={value}".split()) for key, value in result["protocol"].items())
            found.append((*_number(name, result, data), protocol))
    known = {number[:2] for number in found}
    after_fit = [(*_number(name, result), ()) for name, result in load_results(run).items()]
    found += [number for number in after_fit if number[:2] not in known]
    return [number for number in dict.fromkeys(found) if number[2]]


def _number(name: str, result: Mapping[str, Any], data: str = "") -> tuple[str, str, str]:
    """Set, metric, and value with chance; '' for a value that is not finite."""
    of_set, _, metric = name.partition("/")
    chance = "" if result["chance"] is None else f" ({result['chance']:.4f})"
    return data + of_set, metric, f"{result['value']:.4f}{chance}" if math.isfinite(result["value"]) else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _protocols(cfg: DictConfig) -> Iterator[str]:
    """The protocols of the config's evaluation, each with its options and its first sentence."""
    evaluation: Any = OmegaConf.to_container(cfg.eval, resolve=True) if cfg.get("eval") else {}
    yield "\nAt the end of the run, on frozen features of the evaluation transform; what learns from labels learns"
    yield f"from {cfg.data.bank_size or 'all'} rows of the training set:\n"
    for key, node in evaluation.items():
        if isinstance(node, dict) and key != "exhibits":
            options = [f"{name}={value}" for name, value in node.items() if name not in ("_target_", "classes")]
            doc = " ".join((inspect.getdoc(get_object(node["_target_"])) or "").split("\n\n")[0].split())
            doc = re.sub(r" \(:func:`[^`]*`\)", "", doc)
            yield f"- `{key}({', '.join(options)})`: {doc}"
    for of_set, files in ((evaluation.get("zero_shot") or {}).get("classes") or {}).items():
        paths = [files] if isinstance(files, str) else list(files.values() if isinstance(files, dict) else files)
        if not all(Path(path).is_file() for path in paths):  # of the machine that trained
            continue
        for name, classes in load_classes(files).items():
            yield (
                f"- `{name}` on `{of_set}`: {len(classes.names)} classes of `{classes.attribute}`, each the mean over "
                f'{len(classes.templates)} templates at unit length, such as "{classes.templates[0]}"'
            )


def _source(node: Any) -> str:
    """A data source as its config says it: class and options."""
    values: Any = _shortened(OmegaConf.to_container(node, resolve=True))
    target = str(values.get("_target_")).rpartition(".")[2]
    return f"`{target}({', '.join(f'{key}={value}' for key, value in values.items() if not key.startswith('_'))})`"


def _shortened(value: Any) -> Any:
    """Without the folders of the machine: of an absolute path the last name."""
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value
