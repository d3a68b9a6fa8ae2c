"""A page for each objective, the table of all, and the recipes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from docs.generate.heads import Head, head, overrides
from docs.generate.options import loaded, rows
from docs.generate.proofs import Held, golden_tests, losses
from docs.generate.text import ROOT, from_rst, marked, options, table, toctree, write
from repr.config import CONF

# The families, by the modules of the flows in repr/objectives.
FAMILIES = {
    "Image and text": ("image_text", "cross_modal", "captioner", "fusion"),
    "Two or more views": ("joint_embedding", "swav"),
    "A teacher": ("momentum", "self_distillation", "bow"),
    "Masked pictures": ("jepa", "masked_autoencoders", "conditioned_masking"),
    "Cells of the feature map": ("pixpro",),
    "Labels": ("class_pairs", "mixup_contrast"),
    "Hybrids": ("hybrid",),
}
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
CLAIMS = {path for path in (ROOT / "benchmarks" / "claims").glob("*.py") if not path.stem.startswith("_")}


def objective_files() -> list[Path]:
    """The files of ``conf/objective`` that are objectives, not parts of one."""
    return sorted((CONF / "objective").glob("*.yaml"))


def experiment_files() -> list[Path]:
    """The files of ``conf/experiment`` that are recipes, not what several share."""
    return sorted((CONF / "experiment").glob("*.yaml"))


def family(target: str) -> str:
    """The family of a flow.

    Raises:
        KeyError: its module is in none of ``FAMILIES``.
    """
    module = target.split(".")[2]
    return {module: name for name, modules in FAMILIES.items() for module in modules}[module]


def write_objectives() -> None:
    """Write the page of each objective, and their table."""
    by_family = dict[str, list[Path]]({name: [] for name in FAMILIES})
    for path in objective_files():
        objective = loaded(path)
        by_family[family(objective._target_)].append(path)
        write(f"objectives/{path.stem}.md", *_page(path, objective))
    parts = ["# Objectives\n", "`python -m repr.fit objective=NAME` trains any of them.\n"]
    for name, paths in by_family.items():
        cells = ([f"[{p.stem}]({p.stem}.md)", marked(_sentence(head(p))), _papers(head(p))] for p in paths)
        parts += [f"## {name}\n", table(["objective", "what it is", "paper"], cells)]
        parts += [toctree([path.stem for path in paths], name)]
    write("objectives/index.md", *parts)


def write_recipes() -> None:
    """Write the page of all experiments: those on data that come with the package, and those of the papers."""
    ours = [path for path in experiment_files() if "2 cores" in head(path).fields.get("hardware", "")]
    papers = [path for path in experiment_files() if path not in ours]
    parts = ["# Recipes\n", "An experiment is a recipe written out in one file of `conf/experiment`."]
    parts += ["`smoke=true` shrinks any of them to two tiny steps, to see that all of it works.\n"]
    for title, paths in (("Minutes on two cores", ours), ("Those of the papers", papers)):
        parts += [f"## {title}\n", *(line for path in paths for line in _recipe(path, "###"))]
    write("recipes.md", *parts)


def _sentence(of: Head) -> str:
    return of.sentence[0].upper() + of.sentence[1:]


def _papers(of: Head) -> str:
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in of.papers)


def _page(path: Path, objective: DictConfig) -> Iterator[str]:
    name, of = path.stem, head(path)
    yield f"# {name}\n"
    yield f"{marked(of.text)}\n"
    yield f"```bash\npython -m repr.fit objective={name}\n```\n"
    yield f"It needs {_needs(objective, path)}.\n"
    if brought := overrides(path):
        told = ", ".join(f"`{group}={choice}`" for group, choice in brought.items())
        yield f"It brings {told}; an experiment's choice wins over that, and yours over both.\n"
    flows = _flows(objective)
    yield "## How it works\n"
    for part, node in flows.items():
        cls = get_object(node._target_)
        text = inspect.cleandoc(cls.__doc__).partition("\nArgs:")[0].partition("\nRaises:")[0]
        link = f"{{py:class}}`{cls.__name__} <{node._target_}>`"
        yield f"### The part {part}\n\n{link}\n" if part else f"The flow is {link}.\n"
        yield f"```{{eval-rst}}\n{text}\n```\n"
    yield "## Losses\n"
    weights = [(term, f"{weight:g}") for term, weight in _leaves(objective.get("weights") or {})]
    if weights:
        yield table(["term", "weight"], ([f"`{term}`", weight] for term, weight in weights), "lr")
    told = [_losses(part, node, objective) for part, node in flows.items()]
    functions, steps = (set().union(*(of[index] for of in told)) for index in (0, 1))
    docs = ((function, inspect.getdoc(get_object(function)) or "") for function in sorted(functions))
    yield "".join(f"- {{py:func}}`{name}`: {from_rst(doc.partition(chr(10))[0])}\n" for name, doc in docs)
    yield "## Options\n"
    yield options(rows(objective, "objective", path))
    yield from _proofs(name, functions | steps, {node._target_ for node in flows.values()})
    yield f"## The file\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n"
    if recipes := [p for p in experiment_files() if overrides(p).get("objective") == name]:
        yield "## Recipes\n"
        yield from (line for recipe in recipes for line in _recipe(recipe, "###", whole=False))


def _needs(objective: DictConfig, path: Path) -> str:
    """What the YAML tells of text, labels and backbone."""
    learns_labels = family(objective._target_) == "Labels"
    needs = ["pictures and captions" if "text" in objective else "pictures" if learns_labels else "pictures alone"]
    needs += ["labels"] if learns_labels else []
    needs += (
        ["a ViT"] if overrides(path).get("backbone", "").startswith("vit") or "takes a ViT" in head(path).text else []
    )
    return ", ".join(needs[:-1]) + " and " + needs[-1] if len(needs) > 1 else needs[0]


def _flows(objective: DictConfig) -> dict[str, DictConfig]:
    """The flow by an empty name, and those of the parts of a hybrid by theirs."""
    parts = objective.get("parts") or {}
    return {"": objective} | {str(name): part for name, part in parts.items()}


def _losses(part: str, node: DictConfig, objective: DictConfig) -> tuple[set[str], set[str]]:
    """As :func:`losses`, of a flow, or of a part of a hybrid, whose weights are the hybrid's."""
    if "parts" in node:
        return set(), set()
    chosen = {str(term): loss._target_ for term, loss in (node.get("losses") or {}).items()}
    told = objective.get("weights") or {}
    weights = (told.get(part) if part else told) or node.get("weights")
    weights = weights or dict.fromkeys(get_object(node._target_).TERMS, 1.0)
    return losses(node._target_, [str(term) for term, weight in weights.items() if weight], chosen)


def _leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if OmegaConf.is_dict(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _proofs(name: str, functions: set[str], flows: set[str]) -> Iterator[str]:
    yield "## What holds it\n"
    of_losses = [test for test in golden_tests() if test.uses & functions]
    of_flows = [test for test in golden_tests() if test.uses & flows and test not in of_losses]
    if of_losses:
        yield "These tests compare its losses with numbers of the authors' code:\n"
        yield _tests(of_losses)
    if of_flows:
        yield "These compare its flow, which other methods share:\n"
        yield _tests(of_flows)
    if found := _parity(name):
        yield "It has the same gradient on any number of processes ([all objectives](/parity.md)): cells where its"
        yield "length over that of one process, and the cosine between the two, are 1.000, and the largest"
        yield "deviations.\n"
        yield table(["", "cells", "loss", "later", "update", "features"], found, "lrrrrr")
    if lines := [*_measured(name)]:
        yield "It was measured:\n\n" + "\n".join(lines) + "\n"


def _tests(tests: list[Held]) -> str:
    cells = sorted({(", ".join(sorted(test.golden)), f"{test.file}::{test.test}") for test in tests})
    return table(["numbers", "test"], ([f"`{numbers}`", f"`{test}`"] for numbers, test in cells))


def _measured(name: str) -> Iterator[str]:
    """Pages of results that name the method, and claims that train it."""
    word = re.compile(rf"`{name}\b|objective={name}\b|(?<![\w.=-]){re.escape(_method(name))}(?![\w-])")
    pages = {path.stem: path for path in RESULTS if word.search(path.read_text(encoding="utf-8"))}
    for stem, path in pages.items():
        yield f"- [{path.read_text(encoding='utf-8').splitlines()[0][2:]}](/generated/results/{stem}.md)"
    trained = re.compile(rf"objective={name}\b|experiment={name}_|EXPERIMENT = \"{name}_")
    for path in sorted(CLAIMS):
        if path.stem not in pages and trained.search(path.read_text(encoding="utf-8")):
            yield f"- `python -m benchmarks.claims {path.stem}`"


def _method(name: str) -> str:
    """The name of a method as texts have it, or that of the objective."""
    # CLIP stands in the names of many others.
    title = head(CONF / "objective" / f"{name}.yaml").text.partition(":")[0]
    return title if re.fullmatch(r"[A-Z][\w-]*( [A-Zv\d][\w]*)*", title) and title != "CLIP" else name


def _parity(name: str) -> list[list[str]]:
    """The rows of docs/parity.md's first table that belong to an objective, in short."""
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").partition("\n## Losses")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    found = [cells for cells in lines if re.fullmatch(rf"{name}(,.*)?", cells[0])]
    return [[of, f"{cells[:-4].count('1.000 1.000')} of {len(cells) - 4}", *cells[-4:]] for of, *cells in found]


def _recipe(path: Path, level: str, *, whole: bool = True) -> Iterator[str]:
    of = head(path)
    name = path.stem if whole else f"[{path.stem}](/generated/recipes.md#{path.stem})"
    yield f"{level} {name}\n\n{marked(of.text)}\n"
    yield f"```bash\n{_wrapped(of.fields['command'])}\n```\n"
    yield "".join(f"- **{field}**: {marked(text)}\n" for field, text in of.fields.items() if field != "command")
    if whole:
        if objective := overrides(path).get("objective"):
            yield f"Objective: [{objective}](/generated/objectives/{objective}.md)\n"
        values = path.read_text(encoding="utf-8").partition("\ndefaults:")
        yield f"<details><summary>the file</summary>\n\n```yaml\n{''.join(values[1:]).strip()}\n```\n\n</details>\n"


def _wrapped(command: str) -> str:
    """A command in lines that a narrow page shows."""
    lines = [""]
    for word in command.split(" "):
        if len(lines[-1]) + len(word) > 76:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1].strip() else (f" {word}" if lines[-1] else word)
    return " \\\n".join(lines)
