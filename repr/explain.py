"""Showing a config, and explaining an option of it: ``python -m repr.explain KEY [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from repr.catalog import groups, nearest, roots
from repr.cli import add_overrides, one_line_errors, program
from repr.config import ConfigError, compose, select, targets, walk
from repr.listing import listed, rows
from repr.origins import Origin, origins
from repr.signatures import NOT_LITERAL, Argument, arguments, described, summary

RESERVED = {
    "_target_": "The class or function that is built of what stands beside it, by its dotted name.",
    "_partial_": "Whether it is called later, with further arguments.",
    "_recursive_": "Whether what stands below it is built before it.",
    "_convert_": "Whether it gets plain lists and mappings.",
}


def show(cfg: DictConfig, key: str = "") -> str:
    """A composed config, or the part of it below a key, as YAML; a comment tells which values are their default.

    Raises:
        ConfigError: there is no such key.
    """
    if key and key not in (known := [path for path, _ in walk(cfg)]):
        raise ConfigError([f"there is no option '{key}'; {nearest(key, known)}"])
    defaults = {f"{path}.{name}": node["_target_"] for path, node in targets(cfg) for name in _at_default(node)}
    lines, parents = [], list[tuple[int, str]]()
    for line in OmegaConf.to_yaml(cfg).splitlines():
        found = re.match(r"( *)([\w.@/-]+):", line)
        if found is not None:
            indent = len(found[1])
            parents = [parent for parent in parents if parent[0] < indent]
            parents.append((indent, found[2]))
        path = ".".join(name for _, name in parents)
        if found is not None and path in defaults:
            line = f"{line}  # default of {defaults[path].rpartition('.')[2]}"
        if f"{path}.".startswith(f"{key}." if key else ""):
            lines.append(line)
    return textwrap.dedent("\n".join(lines))


def _at_default(node: DictConfig) -> Iterator[str]:
    """The arguments of a node that have their constructor's value."""
    written: Any = OmegaConf.to_container(node)
    for name, default in (arguments(node["_target_"]) or {}).items():
        default = list(default) if isinstance(default, tuple) else default
        if name in written and default is not NOT_LITERAL and written[name] == default:
            yield name


def add_show(parser: argparse.ArgumentParser) -> None:
    """Give a program ``--show [KEY]``."""
    told = "print the composed config, or the part of it below KEY, and leave"
    parser.add_argument("--show", nargs="?", const="", metavar="KEY", help=told)


def shown_key(options: argparse.Namespace) -> str | None:
    """The key of ``--show``, '' for all of the config, None where it was not asked for.

    An override that follows ``--show`` is taken back to the overrides.
    """
    if options.show and "=" in options.show:
        options.overrides.append(options.show)
        options.show = ""
    key: str | None = options.show
    return key


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    description = "Tell the value of an option, where it comes from and what it means."
    result = argparse.ArgumentParser(prog=program("explain"), description=description)
    result.add_argument("key", metavar="KEY", help="an option or a group, such as optim.lr, data.train.root, objective")
    add_overrides(result, "as for fit: what is told is of this config")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_intermixed_args(arguments)
    with one_line_errors():
        print("\n".join(explained(options.key, options.overrides, options.config_dir)))


def explained(key: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Iterator[str]:
    """The lines that explain an option or a group.

    Args:
        key: its dotted name.
        overrides: as for :func:`repr.config.compose`.
        config_dir: a folder of the user's own.

    Raises:
        ConfigError: an override is wrong, or there is no such key; the nearest is told.
    """
    found, root = groups(roots(config_dir)), "fit"
    cfg = compose(overrides, config_dir=config_dir)
    if not overrides and not _argument(cfg, key) and _argument(other := compose(root="evaluate"), key):
        cfg, root = other, "evaluate"
    has = _argument(cfg, key) is not None
    if has:
        yield from option(cfg, key, origins(root, overrides, config_dir))
    elif key not in found:
        known = [path for path, _ in walk(cfg) if path]
        known += [f"{path}.{name}" for path, node in targets(cfg) for name in described(node["_target_"])]
        raise ConfigError([f"there is no option '{key}'; {nearest(key, [*dict.fromkeys(known), *found])}"])
    if key in found:
        yield from [""] * has
        yield from listed(key, config_dir)


def _argument(cfg: DictConfig, key: str) -> Argument | None:
    """What the constructor says of an option; None where neither config nor constructor have it."""
    parent, _, leaf = key.rpartition(".")
    node = select(cfg, parent) if parent else cfg
    target = node.get("_target_") if OmegaConf.is_dict(node) else None
    known = described(target).get(leaf) if target else None
    names = node.keys() if OmegaConf.is_dict(node) else map(str, range(len(node))) if OmegaConf.is_list(node) else ()
    return known or (Argument(NOT_LITERAL, "", RESERVED.get(leaf, "")) if leaf in names else None)


def option(cfg: DictConfig, key: str, given: Sequence[Origin]) -> Iterator[str]:
    """The lines of one option: its value, then where that comes from, its type and what it means.

    Args:
        cfg: a composed config.
        key: of an option that it has, or that a constructor in it takes.
        given: from :func:`repr.origins.origins`.
    """
    argument = _argument(cfg, key) or Argument(NOT_LITERAL, "", "")
    value = select(cfg, key)
    shown, leads_to = _shown(cfg, key, argument)
    yield f"{key} = {shown}"
    comments = [(origin, comment) for origin in reversed(given) if (comment := origin.comment(key)) is not None]
    if key == "name" and comments and not comments[0][0].label.startswith("the command"):
        comments[0] = (Origin("the experiment, or else objective and data", ""), "")
    labels = [origin.label for origin, _ in reversed(comments)] or [f"the default of {_built(cfg, key)}"]
    facts = [("from", ", then ".join(labels) if OmegaConf.is_dict(value) and not leads_to else labels[-1])]
    facts += [("type", argument.kind)]
    facts += [("choose", choices) for choices in (_choices(argument.kind, value),) if choices]
    if OmegaConf.is_dict(value) and (built := value.get("_target_")):
        facts += [("builds", f"{built}: {summary(built)}")]
    facts += [("means", argument.text)]
    facts += [("note" if argument.text else "means", said) for said in (_said(key, given),)]
    facts += [("there", _said(leads_to, given))] if leads_to else []
    yield from _facts(facts)
    if OmegaConf.is_dict(value) and not leads_to:
        names = [str(name) for name in value if not str(name).startswith("_")]
        yield from rows({name: _brief(cfg, f"{key}.{name}", given) for name in names}, wrap=False)


def _built(cfg: DictConfig, key: str) -> str:
    """The class or function that an option is an argument of, or a part of one."""
    while key := key.rpartition(".")[0]:
        if OmegaConf.is_dict(node := select(cfg, key)) and "_target_" in node:
            return str(node["_target_"])
    return "the config"


def _said(key: str, given: Sequence[Origin]) -> str:
    """The comment on an option in the last of the files that have one."""
    return next((words for origin in reversed(given) if (words := origin.comment(key))), "")


def _shown(cfg: DictConfig, key: str, argument: Argument) -> tuple[str, str]:
    """A value on one line, and the name of the option that it is taken over from, if it is."""
    parent, _, leaf = key.rpartition(".")
    node: Any = select(cfg, parent) if parent else cfg
    if OmegaConf.is_dict(node) and leaf not in node.keys():  # noqa: SIM118 - `in node` passes over ???
        has = argument.default is not NOT_LITERAL
        return f"{_text(argument.default)}, if nothing is set (+{key}=...)" if has else f"not set (+{key}=...)", ""
    name: Any = int(leaf) if OmegaConf.is_list(node) else leaf
    if OmegaConf.is_missing(node, name):
        return "???, which you set", ""
    value = select(cfg, key)
    if not OmegaConf.is_interpolation(node, name):
        return _text(value), ""
    raw = str(OmegaConf.to_container(node, resolve=False)[name])  # type: ignore[index]
    found = re.fullmatch(r"\$\{([\w.]+)\}", raw)
    return raw + ("" if OmegaConf.is_config(value) else f", which is {_text(value)}"), found[1] if found else ""


def _text(value: Any) -> str:
    """A value as the command line takes it; of a section what it builds."""
    if isinstance(value, DictConfig):
        return str(value.get("_target_") or ("{...}" if value else "{}"))
    plain = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
    return "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)


def _brief(cfg: DictConfig, key: str, given: Sequence[Origin]) -> str:
    """The value of an option of a section, and the first words about it."""
    argument = _argument(cfg, key) or Argument(NOT_LITERAL, "", "")
    words = _said(key, given) or argument.text
    return _shown(cfg, key, argument)[0] + (f"  ({words})" if words else "")


def _choices(kind: str, value: Any) -> str:
    found = re.search(r"Literal\[(.*?)\]", kind)
    return found[1].replace("'", "") if found else "true, false" if isinstance(value, bool) else ""


def _facts(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    for title, words in facts:
        if words:
            wrapper = textwrap.TextWrapper(width, f"  {title:<8}", " " * 10)
            wrapper.break_long_words = wrapper.break_on_hyphens = False  # of names and paths
            yield wrapper.fill(words)


if __name__ == "__main__":
    main()
