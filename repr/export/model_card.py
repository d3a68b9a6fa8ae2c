"""The model card of an export: ``README.md`` as the hub of Hugging Face reads it, filled from the run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from repr.metrics.classes import load_classes
from repr.runs.folder import load_evaluations, load_results
from repr.runs.trained import Trained

CARD = "README.md"
AFTER_FIT = "end of the run"
RECIPE = ("objective", "optim", "data", "trainer")  # parts of a config; data holds the views, objective the towers
LICENSE = (
    "# license: yours to choose, one of hf.co/docs/hub/repositories-licenses; mind the licences of the data\n"
    "# and of the weights that training began with\n"
)
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

Entry = dict[str, Any]  # set, metric, value, chance, protocol


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
    found = [] if trained.run is None else [*_evaluated(trained), *_after_fit(trained.run)]
    entries = [entry for entry in found if math.isfinite(entry["value"])]
    title = f"{cfg.name}-{cfg.backbone.get('name', 'encoder')}"
    text = trained.has_text and library == "open_clip"
    data = ModelCardData(
        library_name=library,
        pipeline_tag="zero-shot-image-classification" if text else "image-feature-extraction",
        tags=["representation-learning", "repr-pretrain", get_object(cfg.objective["_target_"]).__name__.lower()],
        model_name=title,
        eval_results=_model_index(entries) or None,
    )
    lines = [
        *_about(trained, library, num_stages),
        *_use(library, num_stages),
        *_recipe(cfg),
        *_metrics(trained, entries),
    ]
    content = f"---\n{data.to_yaml()}\n{LICENSE}---\n\n# {title}\n\n" + "\n".join(lines) + "\n"
    (folder / CARD).write_text(content, encoding="utf-8")


TOLD = {  # of weights that are not simply the trained ones
    "teacher": "those of the teacher, the moving average of the trained ones",
    "average": "the average that was kept of the trained ones",
    "unaveraged": "the trained ones, and not the average that was kept of them",
}


def _about(trained: Trained, library: str, num_stages: int) -> Iterator[str]:
    """What was trained, how, on what."""
    cfg, flow = trained.cfg, type(trained.objective)
    backbone = trained.objective.backbone
    towers = f"an image encoder ({cfg.backbone.get('name')}, {_millions(backbone)} M parameters)"
    if trained.has_text and library == "open_clip":
        towers += f" and a text encoder ({_millions(trained.objective.text)} M parameters)"
    stages = f" in {num_stages} stages of multistage learning, each a model of its own" if num_stages else ""
    weights = f"; the weights are {TOLD[trained.weights]}" if trained.weights in TOLD else ""
    yield f"{towers[0].upper()}{towers[1:]}, trained with [repr](https://pypi.org/project/repr-pretrain){stages}{weights}."
    yield ""
    doc = inspect.getdoc(flow) or ""
    methods = next((part for part in doc.split("\n\n") if part.startswith(("Method", "Methods"))), "")
    yield f"- **Objective**: `{flow.__name__}`: {doc.splitlines()[0] if doc else ''} {' '.join(methods.split())}"
    terms = ", ".join(f"{name} {weight:g}" for name, weight in trained.objective.weights.items())
    yield f"- **Weights of its terms**: {terms}"
    yield f"- **Data**: {_source(cfg.data.train)}"
    yield f"- **Images**: {cfg.data.image_size} x {cfg.data.image_size} pixels, RGB"
    batch = cfg.data.batch_size * cfg.trainer.get("accumulate_grad_batches", 1)
    length = f"{cfg.trainer.max_epochs} epochs" if cfg.trainer.get("max_epochs") else f"{cfg.trainer.max_steps} steps"
    yield f"- **Recipe**: {length} of batches of {batch}, {cfg.optim.get('name', 'adamw')} with rate {cfg.optim.lr:g}"
    if cfg.get("init_from") or cfg.backbone.get("pretrained"):
        yield f"- **Began with**: {_shortened(cfg.get('init_from')) or 'the pretrained weights of timm'}"
    if parts := _left_out(trained.objective, library):
        yield f"- **Not included**: {', '.join(parts)}"


def _left_out(objective: Any, library: str) -> list[str]:
    """The parts with weights that served the training alone."""
    kept = {"backbone"} if library == "timm" else {"backbone", "image_projection", "text"}
    return [
        name for name, part in objective.named_children() if name not in kept and any(True for _ in part.parameters())
    ]


def _millions(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}"


def _use(library: str, num_stages: int) -> Iterator[str]:
    yield "\n## Use\n"
    yield f"```python\n{USE['stages' if num_stages else library]}```"


def _recipe(cfg: DictConfig) -> Iterator[str]:
    """The parts of the config that decide what was learned; of paths the last name."""
    parts = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in RECIPE}
    yield "\n## Recipe\n"
    yield f"Seed {cfg.seed}. Paths are shortened to their last name.\n"
    yield f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(_shortened(parts)))}```"


def _metrics(trained: Trained, entries: list[Entry]) -> Iterator[str]:
    yield "\n## Evaluation\n"
    if not entries:
        yield "These weights were not evaluated by the run that they come from."
        return
    yield "| set | metric | value | chance | protocol |\n|---|---|---:|---:|---|"
    for entry in entries:
        chance = "" if entry["chance"] is None else f"{entry['chance']:.4f}"
        protocol = str(entry["protocol"]).replace("|", "\\|").replace("\n", " ")
        yield f"| {entry['set']} | {entry['metric']} | {entry['value']:.4f} | {chance} | {protocol} |"
    sets = {name: _source(node) for name, node in (trained.cfg.data.get("eval") or {}).items()}
    if sets:
        yield "\nSets: " + "; ".join(f"`{name}`: {told}" for name, told in sets.items()) + "."
    if any(entry["protocol"] == AFTER_FIT for entry in entries):
        yield from _protocol(trained.cfg)


def _model_index(entries: list[Entry]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="zero-shot-image-classification"
            if "zero_shot" in entry["metric"]
            else "image-feature-extraction",
            dataset_type=entry["set"],
            dataset_name=entry["set"],
            metric_type=entry["metric"],
            metric_name=entry["metric"],
            metric_value=entry["value"],
            metric_args={"protocol": entry["protocol"]},
        )
        for entry in entries
    ]


def _after_fit(run: Path) -> Iterator[Entry]:
    """``results.json``, the evaluation after the last step."""
    for name, result in load_results(run).items():
        of_set, _, metric = name.partition("/")
        yield {**result, "set": of_set, "metric": metric, "protocol": AFTER_FIT}


def _evaluated(trained: Trained) -> Iterator[Entry]:
    """What ``repr.evaluate`` has found for the run or for the checkpoint."""
    assert trained.run is not None
    for _, evaluation in sorted(load_evaluations(trained.run).items()):
        if Path(evaluation["model"]["name"]).name not in (trained.run.name, Path(trained.name).name):
            continue  # of another checkpoint of the run
        data = "" if evaluation["data"]["name"] == "own" else f"{evaluation['data']['name']}/"
        for name, result in evaluation["results"].items():
            of_set, _, metric = name.partition("/")
            told = ", ".join(f"{key}={value}" for key, value in result["protocol"].items())
            yield {**result, "set": data + of_set, "metric": metric, "protocol": told}


def _protocol(cfg: DictConfig) -> Iterator[str]:
    """The protocols of the config's evaluation, each with its options and its first sentence."""
    evaluation = cfg.get("eval") or {}
    yield "\nAt the end of the run, on frozen features of the evaluation transform; what learns from labels learns"
    yield f"from {cfg.data.bank_size or 'all'} rows of the training set:\n"
    nodes = {key: node for key, node in evaluation.items() if OmegaConf.is_dict(node) and key != "exhibits"}
    for key, node in nodes.items():
        told = ", ".join(f"{name}={value}" for name, value in node.items() if name != "_target_" and name != "classes")
        doc = " ".join((inspect.getdoc(get_object(node["_target_"])) or "").split("\n\n")[0].split())
        yield f"- `{key}({told})`: {doc}"
    for of_set, given in ((evaluation.get("zero_shot") or {}).get("classes") or {}).items():
        files: Any = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
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
