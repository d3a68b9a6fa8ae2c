"""Pages of all options, and of the choices of each group."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from docs.generate.heads import head
from docs.generate.text import from_rst, marked, options, table, toctree, write
from repr.config import CONF, fill

HIDDEN = ("_target_", "_partial_", "_convert_", "_recursive_", "defaults")
GROUPS = {
    "data": "What is read. `data.train` is the training set, `data.eval.<name>` a set that is evaluated.",
    "views": "How pictures are distorted for training; every entry is a view, `count` of them.",
    "objective": "What is trained. [Objectives](/generated/objectives/index.md) has a page for each.",
    "hard_captions": "Captions that are wrong for a picture, for an objective that learns from them.",
    "distorted_captions": "Captions with words left out or exchanged, for an objective that reads several of a sample.",
    "backbone": "The image encoder: any of timm's, by its name.",
    "text": "The text encoder.",
    "tokenizer": "What makes token ids of captions.",
    "optim": "Optimizer and schedule. Learning rates are used as written.",
    "trainer": "Lightning's Trainer: where a run takes place, and how long it is.",
    "logger": "Where numbers are written.",
    "eval": "What is evaluated during training, and at its end.",
    "evaluate": "Single protocols, which `eval` is made of; `+evaluate=NAME` adds one.",
    "procedure": "One run, or several after one another.",
}


def write_options() -> None:
    """Write a page for the options of the top level and the callbacks, and one for each group."""
    fit = CONF / "fit.yaml"
    cfg = loaded(fit, bases=False)
    callbacks = cfg.pop("callbacks")
    parts = [
        "# Options\n",
        "An option is given as `KEY=VALUE`, a file of a group as `GROUP=NAME`. `--show` prints all options of a run",
    ]
    parts += ["with their values.\n", "## Top level\n", options(rows(cfg, "", fit)), "## Groups\n"]
    parts += [table(["group", "what it says"], ([f"[{group}]({group}.md)", text] for group, text in GROUPS.items()))]
    parts += ["## Callbacks\n", options(rows(callbacks, "callbacks", fit)), toctree(GROUPS)]
    write("options/index.md", *parts)
    for group, text in GROUPS.items():
        write(f"options/{group}.md", *_group(group, text))


def _group(group: str, text: str) -> Iterator[str]:
    yield f"# {group}\n"
    yield f"{text}\n"
    own = sorted((CONF / group).glob("*.yaml"), key=lambda path: (path.stem != "default", path.stem))
    link = "[{0}](/generated/objectives/{0}.md)" if group == "objective" else "`{0}`"
    yield table([f"`{group}=`", "what it is"], ([link.format(path.stem), marked(head(path).text)] for path in own))
    if group == "objective":
        return
    for path in own:
        cells = list(rows(loaded(path, bases=False), "eval" if group == "evaluate" else group, path))
        if cells:
            yield f"## {group}={path.stem}\n"
            bases = re.findall(r"^  - /?([\w/]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if bases := [base for base in bases if base != "_self_"]:
                yield f"It begins with {', '.join(f'`{base}`' for base in bases)}.\n"
            yield options(cells)


def loaded(path: Path, *, bases: bool = True) -> DictConfig:
    """A file of ``conf`` as Hydra reads it, in a tenth of the time, and what the constructors say where it does not.

    Args:
        path: the file.
        bases: whether what it begins with belongs to it.
    """
    cfg = _merged(path, bases)
    fill(cfg)
    return cfg


def _merged(path: Path, bases: bool) -> Any:
    cfg: Any = OmegaConf.load(path)
    begun: Any = OmegaConf.create()
    for entry in cfg.pop("defaults", []) if bases else ():
        if isinstance(entry, str) and entry != "_self_":
            name, _, place = entry.partition("@")
            base = _merged(path.parent / f"{name}.yaml", bases)
            begun = OmegaConf.merge(begun, _below("" if place == "_here_" else place, base))
    package = re.search(r"^# @package eval\.(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return OmegaConf.merge(begun, _below(package[1] if package else "", cfg))


def _below(place: str, node: Any) -> Any:
    for key in reversed(place.split(".") if place else ()):
        node = {key: node}
    return node


def rows(node: DictConfig, prefix: str, path: Path, texts: dict[str, str] | None = None) -> Iterator[list[str]]:
    """Option, value and meaning, of all options below a node of a config.

    The meaning is the comment of the file at ``path``, or what the docstring of the node's ``_target_`` says.
    """
    told, said, top = _documented(node.get("_target_")), _comments(path), _comments(CONF / "fit.yaml")
    for key in node:
        if key in HIDDEN:
            continue
        name = f"{prefix}.{key}" if prefix else str(key)
        inner = ".".join(name.split(".")[1:])
        missing = OmegaConf.is_missing(node, key)
        value = "???" if missing else OmegaConf.to_container(node, resolve=False)[key]
        meaning = said.get(name) or said.get(inner) or told.get(str(key)) or top.get(str(key)) or ""
        if isinstance(value, dict) and value:
            if meaning or "_target_" in value:
                of = value.get("_target_", "").rpartition(".")[2]
                yield [f"`{name}`", f"`{of}`" if of else "", meaning]
            yield from rows(node[key], name, path)
        else:
            yield [f"`{name}`", f"`{_value(value)}`", meaning]


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(_value(item) for item in value)}]" if isinstance(value, list) else str(value) or "''"


@cache
def _documented(target: str | None) -> dict[str, str]:
    """Argument -> text, of the docstrings of a class of ours and of those that it inherits from."""
    if target is None or not target.startswith("repr."):
        return {}
    found, thing = dict[str, str](), get_object(target)
    for one in reversed(inspect.getmro(thing)) if inspect.isclass(thing) else [thing]:
        if str(one.__module__).startswith("repr."):
            section = re.search(
                r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(one.__doc__ or ""), re.MULTILINE
            )
            entries = re.split(r"^    (?=[*\w])", section[1] if section else "", flags=re.MULTILINE)[1:]
            for names, _, text in (entry.partition(":") for entry in entries):
                found |= {name.strip(): from_rst(text) for name in names.split(",")}
    return found


@cache
def _comments(path: Path) -> dict[str, str]:
    """Option -> the comment at the end of its line, or in the lines above it."""
    found, parents, above = dict[str, str](), list[tuple[int, str]](), list[str]()
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line[:1] != "#")
    for line in lines[first:]:
        if match := re.match(r"( *)([\w.@/-]+):(?: |$)", line):
            parents = [*(parent for parent in parents if parent[0] < len(match[1])), (len(match[1]), match[2])]
            comment = re.search(r"(?:^|\s)# +(.*)", line)
            text = " ".join([*above, *([comment[1]] if comment else [])])
            if text:
                found[".".join(name for _, name in parents)] = marked(text)
        above = [*above, line.strip("# ")] if line.lstrip().startswith("#") else []
    return found
