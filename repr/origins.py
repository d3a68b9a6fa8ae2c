"""Which files a config is composed of, and what they say about an option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from repr.catalog import CONF, groups, roots
from repr.config import parse_overrides


class Origin(NamedTuple):
    """Something that gives values to a config.

    Attributes:
        label: as a user knows it.
        package: the dotted name of the section that it fills; '' for the whole config.
        path: the file; None: the command line.
    """

    label: str
    package: str
    path: Path | None = None

    def comment(self, key: str) -> str | None:
        """What the file says beside an option or above it, '' where it gives it without a word; None: it does not."""
        name = key.removeprefix(f"{self.package}.") if self.package else key
        if self.package and name == key and key != self.package:
            return None
        if self.path is None or key == self.package:
            return ""
        lines, node = _read(self.path)
        comment = ""
        for part in name.split("."):
            if isinstance(node, yaml.ScalarNode):  # an interpolation, or a file of classes: it gives all below it
                return ""
            found = _entry(node, part)
            if found is None:
                return None
            before, node = found
            comment = _beside(lines, before, node)
        return comment


def origins(root: str, overrides: Sequence[str], config_dir: str | None) -> list[Origin]:
    """What gives values to the config of these overrides, what counts most last.

    Args:
        root: which file of ``conf/`` it is composed of.
        overrides: as for :func:`repr.config.compose`, which has found no fault in them.
        config_dir: a folder of the user's own.
    """
    folders = roots(config_dir)
    known = groups(folders)
    parsed = parse_overrides(overrides, known)
    search = [f"hydra.searchpath=[file://{folder.resolve()}]" for folder in folders[1:]]
    chosen = [str(override.input_line) for override in parsed if override.key_or_group in known]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(root, [*search, *chosen], RunMode.RUN).defaults
    result = []
    for entry in defaults:
        paths = [folder / f"{entry.config_path}.yaml" for folder in reversed(folders)]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            label = f"conf/{entry.config_path}.yaml" if path.is_relative_to(CONF) else str(path)
            result.append(Origin(label, entry.package or "", path))
    values = {override.key_or_group: override for override in parsed if override.key_or_group not in known}
    if "smoke" in values and values["smoke"].value():
        result.append(Origin("smoke=true (conf/smoke.yaml)", "", CONF / "smoke.yaml"))
    return result + [Origin("the command line", key) for key in values]


@lru_cache(maxsize=256)
def _read(path: Path) -> tuple[list[str], yaml.Node | None]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), yaml.compose(text)


def _entry(node: yaml.Node | None, part: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Of a mapping the key and its value; of a list the element twice."""
    if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
        return node.value[int(part)], node.value[int(part)]
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next(((key, value) for key, value in pairs if key.value == part), None)


def _beside(lines: Sequence[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment at the end of the line of a key, and those above it, but for the one that the file begins with."""
    is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    mark = key.end_mark if is_block else value.end_mark
    found = re.match(r":?\s*#\s*(.*)", lines[mark.line][mark.column :]) if mark.line < len(lines) else None
    return " ".join([*reversed([*_above(lines, key.start_mark.line)]), *([found[1]] if found else [])])


def _above(lines: Sequence[str], number: int) -> Iterator[str]:
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    while number > first + 1 and (found := re.match(r"\s*#\s*(.*)", lines[number - 1])):
        yield found[1]
        number -= 1
